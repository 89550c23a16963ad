"""Inputs quantized as a plan says: against a slow loop over what each layer is given."""

import pytest
import torch
from torch import Tensor, nn

import mpq_plugins as mpq
from mpq_plugins import Activations, Affine, SettingError
from mpq_plugins.plans.activations import Dynamic
from mpq_plugins.reconstruction.rounding import Rounding
from tests.helpers.inputs import slowly

ROWS = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


class Branched(nn.Module):
    """Two layers read the same tensor, and one weight has two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 6)
        self.again = self.three

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.again((self.one(x) + self.two(x)).relu())
        return hidden


def plan_of(model: nn.Module, bits: int = 8) -> mpq.Plan:
    return mpq.Uniform(bits=bits)(mpq.measure(model, Affine(granularity="per_channel"), (bits,)))


def given_to(net: nn.Module, name: str, batch: Tensor) -> Tensor:
    """What a layer computes with, its own hooks run."""
    seen: list[Tensor] = []
    handle = net.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        net(batch)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_planned_input_is_at_the_levels_of_a_slow_loop(bits: int, symmetric: bool) -> None:
    net = Branched().eval()
    plan = plan_of(net).with_activations(Activations(bits, symmetric=symmetric))
    quantized = mpq.apply(mpq.calibrate_inputs(net, plan, [ROWS]), plan)
    mpq.verify(quantized, plan, net)
    found = mpq.input_ranges(quantized)["one"]
    assert not symmetric or found.zero_point == 2 ** (bits - 1)
    assert given_to(quantized, "one", ROWS).flatten().tolist() == slowly(ROWS, found.scale, found.zero_point, bits)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dynamic", ["per_tensor", "per_token"])
def test_dynamic_ranges_are_of_each_input_alone(dynamic: Dynamic, symmetric: bool) -> None:
    net = Branched().eval()
    plan = plan_of(net).with_activations(Activations(4, symmetric=symmetric, dynamic=dynamic))
    quantized = mpq.apply(net, plan)  # no batches
    mpq.verify(quantized, plan, net)
    for batch in (ROWS, ROWS[:3] * 100):
        seen = given_to(quantized, "two", batch)
        for token, own in zip(batch, seen, strict=True):
            values = token if dynamic == "per_token" else batch.flatten()
            low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
            if symmetric:
                scale, zero_point = torch.tensor(max(-low, high)) / 7, 8
            else:
                scale = torch.tensor(high) - torch.tensor(low)
                scale = scale / 15
                zero_point = int(torch.round(-torch.tensor(low) / scale))
            assert own.tolist() == slowly(token, float(scale), zero_point, 4)


def test_layers_have_widths_of_their_own_and_tied_ones_one_range_a_module() -> None:
    net = Branched().eval()
    plan = plan_of(net).with_activations({"one": Activations(4), "three": Activations(3)})
    quantized = mpq.apply(net, plan, calibrate=[ROWS])
    assert {name: own.bits for name, own in mpq.input_ranges(quantized).items()} == {"one": 4, "three": 3, "again": 3}
    mpq.verify(quantized, plan)
    with pytest.raises(mpq.VerifyError, match="'one' has inputs of 4 bits"):
        mpq.verify(quantized, plan.with_activation_bits(8))
    with pytest.raises(mpq.VerifyError, match="the plan float ones"):
        mpq.verify(quantized, plan.with_activation_bits(None))


@pytest.mark.parametrize("rounding", ["nearest", "compensated", "learned"])
def test_all_roundings_simulate_inputs_and_leave_the_model_alone(rounding: Rounding) -> None:
    net = Branched().eval()
    plan = plan_of(net, 4).with_activation_bits(3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    if rounding == "learned":  # in a few steps
        quantized = mpq.apply(mpq.reconstruct(net, plan, [ROWS], steps=5), plan)
    else:
        quantized = mpq.apply(net, plan, calibrate=[ROWS], rounding=rounding)
    mpq.verify(quantized, plan)
    assert len(given_to(quantized, "one", ROWS).unique()) <= 8
    assert not mpq.input_ranges(net)
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())


def test_compensation_sees_the_quantized_inputs() -> None:
    """Its outputs are nearer to the float model's than those of weights compensated on float inputs."""
    net = Branched().eval()
    plan = plan_of(net, 3).with_activation_bits(2)
    blind = mpq.compensate(net, plan.with_activation_bits(None), [ROWS])
    seeing = mpq.compensate(net, plan, [ROWS])
    assert not mpq.input_ranges(seeing)
    with torch.no_grad():
        errors = [
            float((mpq.apply(mpq.calibrate_inputs(own, plan, [ROWS]), plan)(ROWS) - net(ROWS)).square().mean())
            for own in (seeing, blind)
        ]
    assert errors[0] < errors[1]


def test_ranges_that_a_model_carries_stay() -> None:
    net = Branched().eval()
    plan = plan_of(net).with_activation_bits(8)
    carried = dict.fromkeys(("one", "two", "three", "again"), mpq.InputRange(8, 0.25, 100))
    ranged = mpq.with_input_ranges(net, carried)
    for fitted in (mpq.correct(ranged, plan, [ROWS]), mpq.compensate(ranged, plan, [ROWS])):
        assert mpq.input_ranges(fitted) == carried
        assert mpq.input_ranges(mpq.apply(fitted, plan)) == carried
    with pytest.raises(SettingError, match="carries ranges of inputs that are not the plan's"):
        mpq.compensate(ranged, plan.with_activation_bits(4), [ROWS])


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (torch.full((4, 8), float("inf")), "layer 'one': activations hold NaN or infinity in batch 1"),
        (torch.full((4, 8), float("nan")), "layer 'one': activations hold NaN or infinity in batch 1"),
        (torch.zeros(4, 8), "layer 'one': its inputs are all zero"),
    ],
)
def test_inputs_that_cannot_be_quantized_name_the_layer(batch: Tensor, said: str) -> None:
    net = Branched().eval()
    with pytest.raises(SettingError, match=said):
        mpq.apply(net, plan_of(net).with_activation_bits(8), calibrate=[batch])


def test_evaluate_simulates_and_refuses_what_it_cannot() -> None:
    net = Branched().eval()
    plan = plan_of(net).with_activation_bits(2)

    def score(tried: nn.Module) -> float:
        return float(len(given_to(tried, "one", ROWS).unique()))

    rows = mpq.evaluate(net, {"a2": plan}, score, calibrate=[ROWS])
    assert [row.scores["score"] <= 4 for row in rows] == [False, True, True]
    with pytest.raises(SettingError, match="whose ranges calibration inputs give"):
        mpq.evaluate(net, {"a2": plan}, score)


class Attending(nn.Module):
    """One layer's weight is used without a call, and one is shared with an embedding that is registered later."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(8, 12, bias=False)
        self.embed = nn.Embedding(12, 8)
        self.embed.weight = self.head.weight
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        logits: Tensor = self.head(self.attention(x, x, x)[0])
        return logits


TOKENS = torch.arange(12).view(2, 6)


def test_an_embedding_that_shares_a_layers_weight_keeps_its_indices() -> None:
    net = Attending().eval()
    plan = plan_of(net).with_activations({"head": Activations(4)})
    quantized = mpq.apply(mpq.calibrate_inputs(net, plan, [TOKENS]), plan)
    assert quantized(TOKENS).shape == (2, 6, 12)
    assert set(mpq.input_ranges(quantized)) == {"head"}
    mpq.verify(quantized, plan)


@pytest.mark.parametrize("dynamic", [None, "per_tensor"])
@pytest.mark.parametrize("batches", [None, [TOKENS]])
def test_a_layer_that_is_never_called_is_named(dynamic: Dynamic | None, batches: list[Tensor] | None) -> None:
    net = Attending().eval()
    plan = plan_of(net).with_activations({"attention.out_proj": Activations(4, dynamic=dynamic)})
    if dynamic is None and batches is None:
        with pytest.warns(UserWarning, match="not simulated"):
            mpq.apply(net, plan)
        return
    with pytest.raises(SettingError, match=r"'attention.out_proj': .*without the layer being called"):
        mpq.apply(net, plan, calibrate=batches)


def test_verify_tells_quantizers_that_do_nothing() -> None:
    net = Branched().eval()
    plan = plan_of(net).with_activation_bits(8)
    quantized = mpq.apply(net, plan, calibrate=[ROWS])
    idle = mpq.apply(net, plan, calibrate=[ROWS])
    quantized.get_buffer("one.input_quantizer.scale").zero_()
    idle.get_submodule("two")._forward_pre_hooks.clear()
    for model, name in ((quantized, "one"), (idle, "two")):
        with pytest.raises(mpq.VerifyError, match=f"'{name}' lets its input pass unquantized"):
            mpq.verify(model, plan)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dynamic", [None, "per_token"])
def test_half_precision_computes_levels_in_float32(dtype: torch.dtype, dynamic: Dynamic | None) -> None:
    net = Branched().eval()
    plan = plan_of(net).with_activations(Activations(12, dynamic=dynamic))
    ranged = mpq.calibrate_inputs(net, plan, [ROWS])
    expected = mpq.input_ranges(ranged)
    x = ROWS.to(dtype)
    levels = ranged.get_submodule("one.input_quantizer")(x.float()).to(dtype)
    moved = ranged.to(dtype)
    assert mpq.input_ranges(moved) == expected
    assert given_to(moved, "one", x).equal(levels)


def test_an_empty_input_stays_empty() -> None:
    net = Branched().eval()
    quantized = mpq.apply(net, plan_of(net).with_activations(Activations(4, dynamic="per_tensor")))
    assert quantized(torch.zeros(0, 8)).shape == (0, 6)


def test_a_layer_in_float_keeps_its_input() -> None:
    net = Branched().eval()
    plan = plan_of(net)
    floats = plan.model_copy(update={"layers": tuple(layer.model_copy(update={"bits": 32}) for layer in plan.layers)})
    with pytest.raises(SettingError, match="layer 'one': stays in floating point"):
        floats.with_activations({"one": Activations(8)})
    assert not floats.with_activation_bits(8).quantizes_inputs
