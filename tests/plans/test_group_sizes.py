"""The scheme that a layer has where its inputs do not divide into the groups that were asked for."""

from dataclasses import replace
from typing import Any, ClassVar, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins import Affine, Codebook, EntropyCoded, Granular, Piecewise, Scheme
from mpq_plugins.errors import SettingError
from mpq_plugins.plans.group_sizes import fitted_to


def by_trying(inputs: int, size: int) -> int | None:
    """Group sizes from what was asked for downwards: it, or a power of two from 16 up."""
    for candidate in range(size, 0, -1):
        allowed = candidate == size or (candidate >= 16 and candidate.bit_count() == 1)
        if allowed and inputs % candidate == 0:
            return candidate
    return None


@pytest.mark.parametrize("kind", [Affine, Piecewise, Codebook])
@given(inputs=st.integers(0, 3000), size=st.integers(1, 600), axis=st.integers(0, 1), kernel=st.integers(0, 2))
def test_it_is_the_largest_group_that_divides(
    kind: type[Affine | Piecewise | Codebook], inputs: int, size: int, axis: int, kernel: int
) -> None:
    asked = kind(granularity="per_group", group_size=size)
    shape = (5, inputs) if axis == 0 else (inputs, 5)
    own = fitted_to(asked, (*shape, *[3] * kernel), axis)
    found = by_trying(inputs, size)
    alone = {"granularity": "per_group" if found else "per_channel", "group_size": found}
    assert own == replace(asked, **alone)  # type: ignore[arg-type]  # they are
    assert own.groups_per_channel((*shape, *[3] * kernel), axis, "fc") == (inputs // found if found else 1)


@pytest.mark.parametrize(
    ("inputs", "size", "own"), [(576, 128, 64), (896, 128, 128), (1152, 256, 128), (40, 32, None), (3, 32, None),
                                (12, 8, None), (1536, 100, 64), (0, 32, 32)]
)  # fmt: skip
def test_what_widths_in_use_get(inputs: int, size: int, own: int | None) -> None:
    assert fitted_to(Affine(granularity="per_group", group_size=size), (8, inputs), 0).group_size == own


@pytest.mark.parametrize("scheme", [Affine(), Affine(granularity="per_channel"), EntropyCoded()], ids=str)
def test_other_schemes_stay(scheme: Scheme) -> None:
    assert fitted_to(scheme, (8, 7), 0) is scheme


class Tens(Granular):
    """A scheme of another package whose groups are always of ten; all that is asked of it."""

    __dataclass_fields__: ClassVar[dict[str, Any]] = {}
    granularity, group_size = "per_group", 10


def test_a_scheme_whose_grain_is_no_field_refuses_the_layer() -> None:
    tens = Tens()
    own = fitted_to(cast(Scheme, tens), (8, 7), 0)
    assert cast(object, own) is tens
    with pytest.raises(SettingError, match="layer 'fc': 7 inputs do not divide into groups of 10"):
        own.groups_per_channel((8, 7), 0, "fc")
