"""What is asked of a measurement, in objects: the scheme, the layers, the weights."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..errors import SettingError
from ..plans.scheme import Affine, Codebook, Scheme
from ..plans.scheme_names import scheme_class, scheme_names
from .scheme_options import known_schemes


@dataclass(frozen=True)
class Request:
    """What the shared options of `mpq measure` and `mpq plan` ask for; None means not said."""

    scheme_name: str | None = None
    scheme_fields: tuple[tuple[str, Any], ...] = ()
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    fold_bn: str | None = None
    weights: str | None = None
    already_quantized: bool | None = None

    def scheme(self, default: Scheme | None) -> Scheme:
        """The scheme that was asked for: what was not said is the default's, or the library's.

        A group size alone means per_group. Raises SettingError for an option of another scheme.
        """
        base = default or Affine()
        if self.scheme_name not in (None, base.name):
            if self.scheme_name not in scheme_names():
                raise SettingError(f"scheme: {self.scheme_name!r} is not allowed; {', '.join(scheme_names())}")
            chosen = scheme_class(self.scheme_name)
            # A codebook for each channel would take more than its codes, so that is only done where it is asked for.
            base = chosen() if chosen is Codebook else chosen(granularity=base.granularity, group_size=base.group_size)
        own = _field_names(base)
        said = dict(self.scheme_fields)
        for name in said:
            if name not in own:
                owner = next(key for key, scheme in known_schemes().items() if name in _field_names(scheme))
                raise SettingError(
                    f"{name}: means nothing with the {base.name} scheme; leave it out, or add --scheme {owner}"
                )
        if "granularity" in said or "group_size" in said:
            said = {"granularity": "per_group", "group_size": None, **said}
        return dataclasses.replace(base, **said)

    @property
    def fold(self) -> bool | str:
        """fold_bn as `measure` takes it."""
        return {"yes": True, "no": False}.get(self.fold_bn or "auto", "auto")

    @property
    def empty(self) -> bool:
        """Whether nothing was said."""
        return self == Request()


def _field_names(scheme: Scheme | type[Scheme]) -> set[str]:
    return {field.name for field in dataclasses.fields(scheme)}
