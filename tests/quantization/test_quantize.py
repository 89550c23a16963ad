"""Laws of every scheme at every width it has, whichever the scheme."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins import Affine, Codebook, Piecewise, SettingError
from mpq_plugins.plans.affine import RANGES
from mpq_plugins.plans.codebook import INITS
from mpq_plugins.plans.granular import GRANULARITIES
from mpq_plugins.plans.piecewise import STORAGES
from mpq_plugins.plans.scheme import Scheme, has_width
from mpq_plugins.quantization.quantize import fake_quantize

SHAPE = (2, 256)  # so many in a channel that each may have a codebook of 8 bits
FORMULAS = ("search", "gaussian", "laplacian_root")
SETTINGS: list[tuple[type[Any], dict[str, Any]]] = [
    *((Affine, {"symmetric": symmetric, "range": rule}) for symmetric in (False, True, "full") for rule in RANGES),
    *((Piecewise, {"breakpoint": rule, "storage": storage}) for rule in FORMULAS for storage in STORAGES),
    *((Codebook, {"init": init}) for init in INITS),
]
SCHEMES: list[Scheme] = [
    kind(**settings, granularity=grain, group_size=128 if grain == "per_group" else None)
    for grain in GRANULARITIES
    for kind, settings in SETTINGS
]


def allowed() -> Iterator[tuple[Scheme, int]]:
    """Every scheme at each of its widths that has room in SHAPE."""
    for scheme, bits in itertools.product(SCHEMES, range(1, 9)):
        try:
            scheme.check_part(bits, SHAPE, 0, SHAPE[0], "fc")
        except SettingError:
            continue
        if has_width(scheme, bits):
            yield scheme, bits


ALLOWED = list(allowed())


def test_all_schemes_are_here_at_all_of_their_widths() -> None:
    assert len(SCHEMES) == 3 * (12 + 6 + 4)
    assert len(ALLOWED) == 3 * 12 * 8 + 3 * 6 * 7 + 4 * (8 + 8 + 7)


def test_a_constant_is_exact() -> None:
    """Every scheme at every width; a constant in each channel, where channels have levels of their own."""
    rows = torch.tensor([0.0, 1.3, -2.7, 1e-30, -3e38, 1e-44])[:, None].expand(6, SHAPE[1]).contiguous()
    for scheme, bits in ALLOWED:
        for weight in rows[:, None] if scheme.granularity == "per_tensor" else [rows]:
            assert fake_quantize(weight, bits, scheme).equal(weight), (str(scheme), bits)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from(ALLOWED))
def test_any_constant_is_exact(value: float, at: tuple[Scheme, int]) -> None:
    scheme, bits = at
    weight = torch.full(SHAPE, value)
    assert fake_quantize(weight, bits, scheme).equal(weight)
