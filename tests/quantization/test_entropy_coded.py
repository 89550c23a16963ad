"""Entropy-coded quantization against a slow loop in Python floats, and its laws."""

import math
import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from mpq_plugins import Affine, EntropyCoded, Part, SettingError, WeightError
from mpq_plugins.quantization.contract import PartShape
from mpq_plugins.quantization.quantize import fake_quantize, quantizer
from mpq_plugins.simulation.integers import integer_weight
from mpq_plugins.simulation.layer import simulate_layer
from tests.helpers.plans import linear

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OFFSETS = st.sampled_from([0.1, 0.25, 0.36, 0.5])


def codes(weights: Sequence[float], step: float, offset: float) -> list[int]:
    """sign(w) floor(|w| / step + offset), one weight at a time."""
    return [int(math.copysign(math.floor(abs(w) / step + offset), w)) for w in weights]


@st.composite
def cases(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = DTYPES) -> tuple[Tensor, EntropyCoded, int]:
    """A weight of any dtype, and a scheme and width that hold it."""
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 7)))
    floats = st.floats(-1, 1, width=32, allow_subnormal=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0])
    scale = draw(st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30]))
    dtype, bits, offset = draw(st.sampled_from(dtypes)), draw(st.integers(2, 8)), draw(OFFSETS)
    weight = (torch.from_numpy(draw(hnp.arrays(np.float32, shape, elements=floats))).double() * scale).to(dtype)
    assume(bool(weight.isfinite().all()))
    finest = EntropyCoded(rounding_offset=offset).finest_step(float(weight.abs().max()), bits)
    step = max(2.0**-126, finest * draw(st.sampled_from([1.0, 1.7, 30.0, 1e6])))
    return weight, EntropyCoded(step=min(step, 1e30), rounding_offset=offset), bits


@given(cases([torch.float32]))
def test_codes_equal_the_slow_loop(case: tuple[Tensor, EntropyCoded, int]) -> None:
    weight, scheme, bits = case
    assert scheme.step is not None
    out, inputs = weight.shape
    found = integer_weight(weight, linear("fc", out, inputs, scheme, bits))
    step = float(np.float32(scheme.step))
    assert found.scale.flatten().tolist() == [step] * len(weight)
    assert not found.zero_point.any()
    rows, found_codes = weight.flatten().tolist(), found.codes.flatten().tolist()
    for w, code, expected in zip(rows, found_codes, codes(rows, step, scheme.offset), strict=True):
        fraction = (abs(w) / step + scheme.offset) % 1
        at_an_edge = min(fraction, 1 - fraction) < 1e-4  # where float32 may go the other way
        assert code == expected or (at_an_edge and abs(code - expected) == 1)
        assert abs(code) <= 2 ** (bits - 1) - 1


@given(cases())
def test_it_is_idempotent_in_every_dtype(case: tuple[Tensor, EntropyCoded, int]) -> None:
    weight, scheme, bits = case
    once = fake_quantize(weight, bits, scheme)
    assert once.dtype == weight.dtype
    assert fake_quantize(once, bits, scheme).equal(once)


def test_no_code_wanders_in_bfloat16() -> None:
    """A level of 100 steps lies 0.4 of a step off in bfloat16, which is more than the dead zone leaves."""
    step = 0.0123
    levels = (torch.arange(-127, 128) * step).to(torch.bfloat16)[None]
    for offset in (0.1, 0.36, 0.5):
        scheme = EntropyCoded(step=step, rounding_offset=offset)
        found = integer_weight(levels, linear("fc", 1, 255, scheme, 8))
        assert found.codes.tolist() == [list(range(-127, 128))]


@given(cases())
def test_integers_files_and_simulation_are_one(case: tuple[Tensor, EntropyCoded, int]) -> None:
    weight, scheme, bits = case
    out, inputs = weight.shape
    choice = linear("fc", out, inputs, scheme, bits)
    simulated = simulate_layer(weight, choice)
    limit = torch.finfo(weight.dtype).max
    integers = integer_weight(weight, choice)
    assert integers.dequantized().clamp(-limit, limit).to(weight.dtype).equal(simulated)
    kind, part = quantizer(scheme), PartShape(tuple(weight.shape), 0, bits, scheme, "fc")
    written = kind.encode(weight, part)
    assert kind.decode(written, part, weight.dtype).equal(simulated)
    assert (written.tables.size, written.zero_points.size) == (0, 0)
    symbols = written.symbols.astype(int).reshape(weight.shape)
    assert (symbols - (symbols >= 2 ** (bits - 1)) * 2**bits).tolist() == integers.codes.tolist()
    assert kind.zeros(written, part).tolist() == (integers.codes == 0).flatten().tolist()


@given(cases([torch.float32]))
def test_signs_are_mirrored_and_zero_stays(case: tuple[Tensor, EntropyCoded, int]) -> None:
    weight, scheme, bits = case
    made = fake_quantize(weight, bits, scheme)
    assert fake_quantize(-weight, bits, scheme).equal(-made)
    assert (made[weight == 0] == 0).all()
    assert scheme.step is not None
    error = (made.double() - weight.double()).abs()
    assert (error <= scheme.step * (1 - scheme.offset) * (1 + 1e-4)).all()


@given(st.integers(2, 8), st.integers(0, 99), st.sampled_from([1e-44, 1e-38, 1e-3, 1.0, 1e38]))
def test_without_a_step_it_is_affine_but_for_ties(bits: int, seed: int, scale: float) -> None:
    weight = (torch.rand(5, 9, generator=torch.Generator().manual_seed(seed)).double() * 2 - 1) * scale
    weight, affine = weight.float(), Affine(symmetric=True, granularity="per_channel")
    weight[1] = 0
    ours, theirs = (integer_weight(weight, linear("fc", 5, 9, scheme, bits)) for scheme in (EntropyCoded(), affine))
    assert ours.scale.equal(theirs.scale)
    ties = (weight.abs() / theirs.scale % 1 - 0.5).abs() < 1e-4
    assert (ours.codes == theirs.codes)[~ties].all()
    assert fake_quantize(weight, bits, EntropyCoded())[1].equal(weight[1])


@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 5e-39])
@pytest.mark.parametrize("step", [None, 2.0**-126, 0.004, 1.0, 1e30])
def test_zero_and_constant_weights(value: float, step: float | None) -> None:
    weight, scheme = torch.full((3, 4), value), EntropyCoded(step=step)
    if step is not None and abs(value) / step > 127:
        with pytest.raises(SettingError, match="is the least step for it"):
            fake_quantize(weight, 8, scheme)
        return
    made = fake_quantize(weight, 8, scheme)
    expected = (
        value
        if step is None
        else codes([value], float(np.float32(step)), scheme.rounding_offset)[0] * float(np.float32(step))
    )
    torch.testing.assert_close(made, torch.full((3, 4), expected), rtol=1e-6, atol=1e-42)


@given(cases([torch.float32]), st.floats(1.001, 1e6))
def test_a_step_too_small_is_refused_and_the_least_one_named_works(
    case: tuple[Tensor, EntropyCoded, int], times: float
) -> None:
    weight, scheme, bits = case
    largest = float(weight.abs().max())
    finest = scheme.finest_step(largest, bits)
    assume(finest / times > 2.0**-126)
    small = EntropyCoded(step=finest / times, rounding_offset=scheme.rounding_offset)
    with pytest.raises(SettingError) as raised:
        fake_quantize(weight, bits, small, layer="block.fc")
    said = re.fullmatch(
        rf"layer 'block\.fc': step: \S+ is so small that the weight \S+ would have a code beyond {bits} bits, which "
        rf"end at {2 ** (bits - 1) - 1}; (\S+) is the least step for it\. Plan for a smaller file, or leave the "
        r"layer out \(skip\)",
        str(raised.value),
    )
    assert said is not None
    least = EntropyCoded(step=float(said[1]), rounding_offset=scheme.rounding_offset)
    assert fake_quantize(weight, bits, least).isfinite().all()


def test_the_greatest_of_weights_over_the_least_of_steps_is_refused_without_a_warning() -> None:
    with pytest.raises(SettingError, match=r"layer 'weight': step: 1\.17549e-38 is so small"):
        fake_quantize(torch.full((1, 2), 3e38), 8, EntropyCoded(step=2.0**-126))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(WeightError, match="layer 'fc'"):
        fake_quantize(torch.tensor([[1.0, bad]]), 8, EntropyCoded(step=0.1), layer="fc")


def test_each_part_has_its_own_ends() -> None:
    weight = torch.tensor([[0.1, 0.3], [1.2, -1.5], [0.0, 0.05]])
    scheme = EntropyCoded(step=0.1, rounding_offset=0.5)
    choice = linear("fc", 3, 2, scheme, {4: (0, 2), 8: (1,)})
    assert integer_weight(weight, choice).codes.tolist() == [[1, 3], [12, -15], [0, 1]]
    assert integer_weight(weight, choice).dequantized().equal(simulate_layer(weight, choice))
    other = choice.model_copy(update={"parts": (Part(bits=4, channels=(0, 1)), Part(bits=8, channels=(2,)))})
    with pytest.raises(SettingError, match=r"weight 1\.5 would have a code beyond 4 bits, which end at 7"):
        simulate_layer(weight, other)
