"""What is asked of a measurement, in objects: the scheme, the layers, the weights."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..allocation.contract import Needs
from ..common.checks import shown
from ..common.registry import at_work
from ..errors import PluginError, SettingError
from ..plans.affine import Affine
from ..plans.piecewise import Piecewise
from ..plans.scheme import Scheme
from ..plans.scheme_names import scheme_class, scheme_names
from .field_options import spelled

if TYPE_CHECKING:  # `mpq --help` should not wait for it
    from ..measurement.request import MeasureRequest

FOLDS: dict[str, bool | Literal["auto"]] = {"yes": True, "no": False, "auto": "auto"}
PER_GROUP: dict[str, Any] = {"granularity": "per_group", "group_size": None}  # where one of them alone is said


@dataclass(frozen=True)
class Request:
    """What the shared options of `mpq measure` and `mpq plan` ask for; None means not said.

    from_file: whether all of it is a file's defaults, which a table that is measured already leaves aside.
    refused_schemes: those whose fields are no options, and why.
    """

    scheme_name: str | None = None
    scheme_fields: tuple[tuple[str, Any], ...] = ()
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    fold_bn: str | None = None
    weights: str | None = None
    already_quantized: bool | None = None
    from_file: bool = field(default=False, compare=False)
    refused_schemes: Mapping[str, str] = field(default_factory=dict, compare=False)

    def scheme(self, default: Scheme | None) -> Scheme:
        """The scheme that was asked for: what was not said is the default's, or the library's.

        A group size alone means per_group. Raises SettingError for an option of another scheme, and PluginError for
        a scheme of another package that cannot be made.
        """
        base = default or Affine()
        name = self.scheme_name or base.name
        if name != base.name and name not in scheme_names():
            raise SettingError(f"scheme: {shown(name)} is not allowed; {', '.join(scheme_names())}")
        said = dict(self.scheme_fields)
        if name in self.refused_schemes and (said or self.scheme_name):
            raise PluginError(self.refused_schemes[name])
        kind = type(base) if name == base.name else scheme_class(name)
        fields = _field_names(kind)
        for option in said:
            if option not in fields:
                raise SettingError(
                    f"{option}: means nothing with the {name} scheme; leave it out, or add --scheme "
                    f"{self._having(option)}"
                )
        if "granularity" in said or "group_size" in said:
            said = {**{key: value for key, value in PER_GROUP.items() if key in fields}, **said}
        with at_work("schemes", kind):
            return _replaced(base, said) if name == base.name else _made(kind, name, {**_handed_on(kind, base), **said})

    def _having(self, option: str) -> str:
        """A scheme that has the field, as one has that gave the option."""
        return next(
            name
            for name in scheme_names()
            if name not in self.refused_schemes and option in _field_names(scheme_class(name))
        )

    def of_measurement(self, needs: Needs) -> "MeasureRequest":
        """The same as a measurement takes it, for what allocators need. Raises SettingError."""
        from ..measurement.request import MeasureRequest

        return MeasureRequest(
            self.scheme(needs.scheme), needs.bits, needs.metrics, per_channel=needs.channel_errors, skip=self.skip,
            only=self.only, fold_bn=FOLDS[self.fold_bn or "auto"], weights=self.weights,
            already_quantized=bool(self.already_quantized),
        ).checked()  # fmt: skip

    @property
    def empty(self) -> bool:
        """Whether nothing was said."""
        return self == Request()


def _field_names(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind) if field.init}


def _handed_on(kind: Any, base: Scheme) -> dict[str, Any]:
    """What a scheme that was asked for takes from the one it stands in for.

    A codebook for each channel would take more than its codes, so that is only done where it is asked for. What the
    schemes of other packages are made for, their defaults say.
    """
    return {"granularity": base.granularity, "group_size": base.group_size} if kind in (Affine, Piecewise) else {}


def _replaced(base: Scheme, said: dict[str, Any]) -> Scheme:
    return dataclasses.replace(base, **said) if said else base


def _made(kind: Any, name: str, given: dict[str, Any]) -> Scheme:
    """The scheme of these fields. Raises SettingError naming an option that it needs."""
    for each in dataclasses.fields(kind):
        unset = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        if each.init and unset and each.name not in given:
            raise SettingError(f"{each.name}: the {name} scheme needs it; give {spelled(each.name)}")
    made: Scheme = kind(**given)
    return made
