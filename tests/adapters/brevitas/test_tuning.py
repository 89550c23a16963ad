"""Calibration, bias correction, GPTQ, GPFQ, learned rounding and training: what moves, what stays, what is refused."""

import copy
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from brevitas import config
from torch import Tensor, nn

from mpq_plugins import PTILMPQ, Activations, Affine, InputRange, Plan, Uniform, with_input_ranges
from mpq_plugins import apply as simulated
from mpq_plugins.errors import MismatchError, SettingError, VerifyError, WeightError
from tests.adapters import nets
from tests.adapters.brevitas.test_conversion import TOKENS, EveryKind, own_way, planned
from tests.helpers.nets import tied_net
from tests.helpers.plans import with_layer

pytestmark = pytest.mark.filterwarnings("ignore:Positional args are being deprecated:FutureWarning")
mpq_brevitas = pytest.importorskip("mpq_plugins.adapters.brevitas")
reading = pytest.importorskip("mpq_plugins.adapters.brevitas.read")
layerwise_quantize = pytest.importorskip("brevitas.graph.quantize").layerwise_quantize

BATCHES = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
TUNERS: dict[str, Callable[..., Any]] = {
    "gptq": mpq_brevitas.gptq,
    "gpfq": mpq_brevitas.gpfq,
    "learned_round": lambda model, batches, **settings: mpq_brevitas.learned_round(
        model, batches, steps=100, lr=1e-2, **settings
    ),
}
PARTS = PTILMPQ(important_bits=(4, 3), other_bits=(3, 2))


def converted(scheme: Affine | None = None, allocator: Any = None) -> tuple[Any, Plan, Any]:
    """The float model, its plan, and the Brevitas model."""
    model = nets.made(nets.SmallNet)
    plan = planned(model, scheme, allocator or Uniform(bits=3))
    return model, plan, mpq_brevitas.to_brevitas(model, plan)


def codes(model: nn.Module) -> dict[str, Tensor]:
    layers = ((name, module) for name, module in model.named_modules() if reading.is_quantized(module))
    return {name: reading.weight_codes(module).codes for name, module in layers}


def error(model: nn.Module, target: nn.Module) -> float:
    """Mean squared error of the logits on all batches."""
    with torch.no_grad():
        return float(sum((model(batch) - target(batch)).square().mean() for batch in BATCHES))


@pytest.mark.parametrize(
    ("tune", "allocator"),
    [  # binary weights have no rounding to learn
        *((tune, allocator) for tune in TUNERS for allocator in (Uniform(bits=3), PARTS)),
        *((tune, Uniform(bits=1)) for tune in ("gptq", "gpfq")),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_codes_move_on_the_plans_grid_and_the_given_model_stays(tune: str, allocator: Any) -> None:
    model, plan, quantized = converted(allocator=allocator)
    before, state = codes(quantized), {name: value.clone() for name, value in quantized.state_dict().items()}
    tuned = TUNERS[tune](quantized, BATCHES)
    after = codes(tuned)
    assert any(not after[name].equal(before[name]) for name in before)
    mpq_brevitas.verify_tuned(tuned, plan)
    with pytest.raises(VerifyError, match="not the plan's"):
        mpq_brevitas.verify(tuned, plan, model)
    assert error(tuned, model) < error(quantized, model)
    assert all(value.equal(state[name]) for name, value in quantized.state_dict().items())
    assert tuned.state_dict().keys() == quantized.state_dict().keys()
    names = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
    assert names == [name for name, _ in quantized.named_parameters()]


@pytest.mark.parametrize(
    "scheme", [Affine(), Affine(symmetric=True), Affine(granularity="per_group", group_size=4)], ids=str
)
@pytest.mark.parametrize("tune", TUNERS)
def test_every_granularity_can_be_tuned(tune: str, scheme: Affine) -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model, scheme, Uniform(bits=3), skip=["conv1", "conv2"] if scheme.group_size else [])
    tuned = TUNERS[tune](mpq_brevitas.to_brevitas(model, plan), BATCHES)
    mpq_brevitas.verify_tuned(tuned, plan)


def test_learned_rounding_moves_codes_by_one_at_most() -> None:
    _, _, quantized = converted()
    before, after = codes(quantized), codes(TUNERS["learned_round"](quantized, BATCHES))
    assert max(float((after[name] - before[name]).abs().max()) for name in before) == 1


@pytest.mark.parametrize("tune", TUNERS)
def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before(tune: str) -> None:
    _, _, quantized = converted()
    torch.manual_seed(1)
    first = codes(TUNERS[tune](quantized, BATCHES))
    torch.manual_seed(2)
    drawn = torch.rand(1)
    torch.manual_seed(2)
    second = codes(TUNERS[tune](quantized, BATCHES))
    assert all(first[name].equal(second[name]) for name in first)
    assert torch.rand(1) == drawn  # the user's own random numbers are left alone


@pytest.mark.parametrize("tune", TUNERS)
def test_tuning_again_begins_at_the_float_weights(tune: str) -> None:
    _, _, quantized = converted()
    once = TUNERS[tune](quantized, BATCHES)
    twice = TUNERS[tune](once, BATCHES)
    assert all(codes(once)[name].equal(codes(twice)[name]) for name in codes(once))


@pytest.mark.parametrize("tune", TUNERS)
def test_biases_can_be_corrected_afterwards(tune: str) -> None:
    _, plan, quantized = converted()
    tuned = TUNERS[tune](quantized, BATCHES)
    corrected = mpq_brevitas.correct_bias(tuned, BATCHES)
    mpq_brevitas.verify_tuned(corrected, plan)
    assert not corrected.fc.bias.equal(tuned.fc.bias)
    assert all(codes(corrected)[name].equal(codes(tuned)[name]) for name in codes(tuned))


def test_bias_correction_takes_the_mean_error_away() -> None:
    model, plan, quantized = converted()
    corrected = mpq_brevitas.correct_bias(quantized, BATCHES)
    mpq_brevitas.verify_tuned(corrected, plan)
    assert corrected.conv1.bias is not None  # where there was none
    seen: dict[str, Tensor] = {}
    for which in (model, quantized, corrected):
        with torch.no_grad():
            seen[str(which is model) + str(which is corrected)] = torch.cat([which.conv1(b) for b in BATCHES])
    target = seen["TrueFalse"].mean(dim=(0, 2, 3))
    assert torch.allclose(seen["FalseTrue"].mean(dim=(0, 2, 3)), target, atol=1e-5)
    assert not torch.allclose(seen["FalseFalse"].mean(dim=(0, 2, 3)), target, atol=1e-3)


@pytest.mark.parametrize("tune", ["gptq", "gpfq"])
def test_the_default_scales_of_brevitas_under_which_nothing_happens_are_refused(tune: str) -> None:
    quantized = own_way(nets.made(nets.SmallNet), weight_bit_width=3)
    with pytest.raises(SettingError, match=r"would do nothing to 'conv1', 'conv2', 'fc'.*PARAMETER_FROM_STATS"):
        TUNERS[tune](quantized, BATCHES)
    ours = own_way(nets.made(nets.SmallNet), weight_bit_width=3, weight_scaling_impl_type="PARAMETER_FROM_STATS")
    assert any(not codes(TUNERS[tune](ours, BATCHES))[name].equal(before) for name, before in codes(ours).items())


@pytest.mark.parametrize("tune", TUNERS)
def test_a_run_that_changes_no_code_is_an_error(tune: str) -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model)
    on_grid = mpq_brevitas.to_brevitas(simulated(model, plan), plan)
    with pytest.raises(SettingError, match="changed no code"):
        TUNERS[tune](on_grid, BATCHES)


def _loaded(model: Any) -> Any:
    model.load_state_dict(model.state_dict())
    return model


def _trained(model: Any) -> Any:
    return mpq_brevitas.train(model, BATCHES, lambda model, batch: model(batch).square().mean(), epochs=1)


def _trained_by_hand(model: Any) -> Any:
    with torch.no_grad():
        model.fc.weight.mul_(1.01)
    return model


def _bias_by_hand(model: Any) -> Any:
    with torch.no_grad():
        model.fc.bias.add_(1)
    return model


@pytest.mark.parametrize("before", [None, "gptq", "learned_round"])
@pytest.mark.parametrize("change", [_loaded, _trained, _trained_by_hand, _bias_by_hand])
@pytest.mark.parametrize("tune", [*TUNERS, "correct_bias"])
def test_what_was_trained_or_loaded_has_no_float_weights_to_tune_by(tune: str, change: Any, before: str | None) -> None:
    _, _, quantized = converted()
    changed = change(quantized if before is None else TUNERS[before](quantized, BATCHES))
    with pytest.raises(SettingError, match=r"the float weights of .*'fc' are gone.*Convert the float model anew"):
        getattr(mpq_brevitas, tune)(changed, BATCHES)


def test_a_users_own_conversion_that_is_on_its_grid_has_none_either() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model)
    given = simulated(model, plan)
    mine = layerwise_quantize(given, compute_layer_map=mpq_brevitas.layer_map(plan, model))
    with pytest.raises(SettingError, match="the float weights of 'conv1', 'conv2', 'fc' are gone"):
        mpq_brevitas.correct_bias(mine, BATCHES)
    fresh = layerwise_quantize(copy.deepcopy(model), compute_layer_map=mpq_brevitas.layer_map(plan, model))
    mpq_brevitas.verify_tuned(mpq_brevitas.gptq(fresh, BATCHES), plan)


@pytest.mark.parametrize("tune", TUNERS)
def test_the_order_of_corrections_does_not_matter(tune: str) -> None:
    model, _, quantized = converted()
    corrected = mpq_brevitas.correct_bias(quantized, BATCHES)
    twice = mpq_brevitas.correct_bias(corrected, BATCHES)
    assert all(twice.state_dict()[name].equal(value) for name, value in corrected.state_dict().items())
    plain, after = TUNERS[tune](quantized, BATCHES), TUNERS[tune](corrected, BATCHES)
    assert after.conv1.bias is None
    assert all(after.state_dict()[name].equal(value) for name, value in plain.state_dict().items())
    assert error(mpq_brevitas.correct_bias(after, BATCHES), model) < error(quantized, model)


def test_bias_correction_counts_every_input_alike() -> None:
    _, _, quantized = converted()
    whole = torch.cat(BATCHES)
    even = mpq_brevitas.correct_bias(quantized, [whole])
    uneven = mpq_brevitas.correct_bias(quantized, [whole[:1], whole[1:]])
    for name in ("conv1", "conv2", "fc"):
        torch.testing.assert_close(getattr(uneven, name).bias, getattr(even, name).bias, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tune", [*TUNERS, "correct_bias"])
@pytest.mark.filterwarnings("ignore:.*leaves 'embed'.*as they were")
def test_shared_modules_and_tied_weights_can_be_tuned(tune: str) -> None:
    model = tied_net()
    plan = planned(model, allocator=Uniform(bits=3))
    tuned = getattr(mpq_brevitas, tune)(mpq_brevitas.to_brevitas(model, plan), [TOKENS])
    mpq_brevitas.verify_tuned(tuned, plan)
    assert tuned.block is tuned.again
    assert tuned.lm_head.weight is tuned.embed.weight


@pytest.mark.parametrize("tune", TUNERS)
def test_a_models_own_forward_and_frozen_parameters_stay(tune: str) -> None:
    model: Any = nets.made(nets.SmallNet)
    plan = planned(model, allocator=Uniform(bits=3))
    model.forward = MethodType(lambda self, x: 7 * type(self).forward(self, x), model)
    model.conv2.bias.requires_grad_(False)
    model.fc.weight.requires_grad_(False)
    tuned = TUNERS[tune](mpq_brevitas.to_brevitas(model, plan), BATCHES)
    with torch.no_grad():
        assert torch.allclose(tuned(BATCHES[0]), 7 * type(tuned).forward(tuned, BATCHES[0]))
    frozen = {name for name, parameter in tuned.named_parameters() if not parameter.requires_grad}
    assert frozen == {"conv2.bias", "fc.weight"}


class Routed(nn.Module):
    """A layer for positive inputs and one for negative ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.a(x) if x.sum() > 0 else self.b(x)
        return logits


@pytest.mark.parametrize("tune", TUNERS)
def test_layers_that_a_later_batch_reaches_are_tuned(tune: str) -> None:
    torch.manual_seed(0)
    model = Routed().eval()
    plan = planned(model, allocator=Uniform(bits=2))
    quantized = mpq_brevitas.to_brevitas(model, plan)
    up = torch.rand(64, 1) + 0.1 * torch.rand(64, 6)  # inputs so alike that errors can make up for each other
    down = -up
    before, after = codes(quantized), codes(TUNERS[tune](quantized, [up, down]))
    assert not after["b"].equal(before["b"])
    with pytest.warns(UserWarning, match="leaves 'b' as they were"):
        TUNERS[tune](quantized, [up])


class Deciding(Routed):
    """Takes its way by a value that quantizing changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 1, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[1.0, 1.0, 1.0, -0.99, -0.99, -0.99]]))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.a(x) if self.first(x).sum() > 1e-3 else self.b(x)
        return logits


def test_a_block_that_only_the_quantized_model_reaches_is_refused() -> None:
    model = Deciding().eval()
    plan = with_layer(planned(model), "first", bits=1)
    quantized = mpq_brevitas.to_brevitas(model, plan)
    with pytest.raises(MismatchError, match=r"reaches block 'b' in 1 of 1 batches and the float one in 0"):
        mpq_brevitas.learned_round(quantized, [torch.ones(8, 6)], steps=2)


def test_calibration_wants_every_layer_reached_and_begins_again() -> None:
    torch.manual_seed(0)
    model = Routed().eval()
    quantized = mpq_brevitas.to_brevitas(model, planned(model), activation_bits=8)
    batch = torch.rand(32, 6)
    with pytest.raises(SettingError, match="no batch reaches 'b'"):
        mpq_brevitas.calibrate(quantized, [batch])
    small = mpq_brevitas.calibrate(quantized, [batch, -batch])
    large, fresh = (mpq_brevitas.calibrate(which, [10 * batch, -10 * batch]) for which in (small, quantized))
    assert large.a.input_quant.scale().equal(fresh.a.input_quant.scale())
    assert not large.a.input_quant.scale().equal(small.a.input_quant.scale())


class Flattening(nn.Module):
    """A block that gives more rows than it takes, under a mask as wide as a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.fc(mask @ x)).flatten(0, 1))
        return logits


def test_blocks_may_do_with_rows_what_they_like() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Flatten(0, 1), nn.Linear(6, 4)).eval()
    plan = planned(model, allocator=Uniform(bits=2))
    batches = [torch.randn(8, 5, 6) for _ in range(4)]
    quantized = mpq_brevitas.to_brevitas(model, plan)
    tuned = mpq_brevitas.learned_round(quantized, batches, steps=100)
    with torch.no_grad():
        errors = [sum((net(b) - model(b)).square().mean() for b in batches) for net in (tuned, quantized)]
    assert errors[0] < errors[1]
    masked = Flattening().eval()
    pairs = [(torch.randn(8, 8, 6), torch.rand(8, 8)) for _ in range(4)]
    plan = planned(masked, allocator=Uniform(bits=2))
    tuned = mpq_brevitas.learned_round(mpq_brevitas.to_brevitas(masked, plan), pairs, steps=60)
    mpq_brevitas.verify_tuned(tuned, plan)


@pytest.mark.parametrize("tune", [*TUNERS, "correct_bias"])
def test_inputs_without_a_batch_dimension_are_refused(tune: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    quantized = mpq_brevitas.to_brevitas(model, planned(model))
    with pytest.raises(SettingError, match="layer '0' is given inputs without a batch dimension"):
        getattr(mpq_brevitas, tune)(quantized, [torch.randn(3, 8, 8)])


def test_the_teacher_stays_as_it_is_and_may_answer_in_many_ways() -> None:
    model, _, quantized = converted()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss = mpq_brevitas.distillation(model)
    mpq_brevitas.train(quantized, BATCHES, loss, epochs=1)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert model.training
    expected = loss(quantized, BATCHES[0])
    for answer in (lambda y: (y, None), lambda y: [y], lambda y: SimpleNamespace(logits=y)):
        told = mpq_brevitas.distillation(Answering(nets.made(nets.SmallNet), answer))
        assert told(Answering(quantized, answer), BATCHES[0]) == expected
    with pytest.raises(SettingError, match="the model gives a dict, no logits"):
        mpq_brevitas.distillation(Answering(model, lambda y: {"y": y}))(quantized, BATCHES[0])


class Answering(nn.Module):
    """A network that gives its logits in some other form."""

    def __init__(self, net: nn.Module, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.answer = net, answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.net(x))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, batch: 1.0, "must be a scalar tensor with a gradient"),
        (lambda model, batch: model(batch), "must be a scalar tensor with a gradient"),
        (lambda model, batch: model(batch).mean().detach(), "must be a scalar tensor with a gradient"),
        (nn.functional.cross_entropy, r"loss\(model, batch\) fails \(TypeError.*lambda model, batch"),
    ],
)
def test_a_loss_that_is_none(loss: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        mpq_brevitas.train(converted()[2], BATCHES, loss)


def test_training_wants_something_to_train() -> None:
    quantized = converted()[2].requires_grad_(False)
    with pytest.raises(SettingError, match="every parameter is frozen"):
        mpq_brevitas.train(quantized, BATCHES, lambda model, batch: model(batch).mean())


def test_models_without_anything_to_tune_are_told_so() -> None:
    model = nn.Sequential(nn.Embedding(20, 8)).eval()
    quantized = mpq_brevitas.to_brevitas(model, planned(model), activation_bits=8)
    with pytest.raises(SettingError, match=r"calibrate: no layer quantizes its inputs.*embeddings take indices"):
        mpq_brevitas.calibrate(quantized, [TOKENS])
    with pytest.raises(SettingError, match="reach no layer that can have a bias"):
        mpq_brevitas.correct_bias(quantized, [TOKENS])
    with pytest.raises(SettingError, match="reach no layer that Brevitas has it for"):
        mpq_brevitas.gptq(quantized, [TOKENS])
    with pytest.raises(SettingError, match="no layer that a batch reaches has a rounding to learn"):
        mpq_brevitas.learned_round(quantized, [TOKENS])


def test_threads_may_round_at_once() -> None:
    _, _, quantized = converted()
    before = config.IGNORE_MISSING_KEYS
    expected = codes(TUNERS["learned_round"](quantized, BATCHES))
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: codes(TUNERS["learned_round"](quantized, BATCHES)), range(3)))
    assert all(one[name].equal(expected[name]) for one in found for name in expected)
    assert config.IGNORE_MISSING_KEYS is before


def test_activations_are_calibrated_before_anything_else() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model)
    quantized = mpq_brevitas.to_brevitas(model, plan, activation_bits=6)
    with_bits = plan.with_activation_bits(6)
    with pytest.raises(VerifyError, match="'conv1' has not had its input calibrated: call calibrate"):
        mpq_brevitas.verify(quantized, with_bits, model)
    for tune in (*TUNERS.values(), mpq_brevitas.correct_bias):
        with pytest.raises(SettingError, match=r"'conv1'.*have no range yet; call calibrate first"):
            tune(quantized, BATCHES)
    ready = mpq_brevitas.calibrate(quantized, BATCHES)
    checks = mpq_brevitas.verify(ready, with_bits, model)
    assert [check.activation_bits for check in checks] == [6, 6, 6]
    with pytest.raises(VerifyError, match="'conv1' takes its input at 6 bits, the plan floating point"):
        mpq_brevitas.verify_tuned(ready, plan)
    for tune in TUNERS.values():
        mpq_brevitas.verify_tuned(tune(ready, BATCHES), with_bits)


WIDTHS = {
    "conv1": Activations(8, range="minmax"),
    "conv2": Activations(3, symmetric=True, range="minmax"),
    "fc": Activations(2, range="minmax"),
}


def test_each_layers_input_has_the_planned_width_and_range() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model).with_activations(WIDTHS)
    ready = mpq_brevitas.apply(model, plan, BATCHES)
    checks = {check.layer: check for check in mpq_brevitas.verify(ready, plan, model, batch=BATCHES[0])}
    assert {name: check.activation_bits for name, check in checks.items()} == {"conv1": 8, "conv2": 3, "fc": 2}
    given: dict[str, list[Tensor]] = {name: [] for name in WIDTHS}
    float_model = simulated(model, plan.with_activation_bits(None))
    for name, seen in given.items():
        float_model.get_submodule(name).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
    with torch.no_grad():
        for batch in BATCHES:
            float_model(batch)
    for name, own in WIDTHS.items():
        values, found = torch.cat([x.flatten() for x in given[name]]), checks[name].input_range
        low, high = values.min().clamp(max=0), values.max().clamp(min=0)
        span = 2 * values.abs().max() / (2**own.bits - 2) * (2**own.bits - 1) if own.symmetric else high - low
        assert found.scale == pytest.approx(float(span) / (2**own.bits - 1), rel=1e-5)
        assert found.zero_point == (4 if own.symmetric else round(float(-low / found.scale)))
    mixed = plan.with_activations({"conv2": None})
    checks = mpq_brevitas.verify(mpq_brevitas.apply(model, mixed, BATCHES), mixed, model, batch=BATCHES[0])
    assert [check.activation_bits for check in checks] == [8, None, 2]


def test_carried_ranges_are_taken_and_values_are_the_simulations() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model).with_activations(WIDTHS)
    ranges = {"conv1": InputRange(8, 0.03125, 120), "conv2": InputRange(3, 0.5, 4), "fc": InputRange(2, 0.25, 1)}
    carrying = with_input_ranges(model, ranges)
    quantized = mpq_brevitas.apply(carrying, plan)
    checks = mpq_brevitas.verify(quantized, plan, carrying)
    assert {check.layer: check.input_range for check in checks} == ranges
    with torch.no_grad():
        torch.testing.assert_close(quantized(BATCHES[0]), simulated(carrying, plan)(BATCHES[0]), rtol=1e-4, atol=1e-4)
    other = with_input_ranges(model, ranges | {"fc": InputRange(2, 0.25, 2)})
    with pytest.raises(VerifyError, match="'fc' has its input in another range than the model carries"):
        mpq_brevitas.verify(quantized, plan, other)
    with pytest.raises(SettingError, match="its ranges of inputs are not the plan's: 'conv1' carries 8 bits, the"):
        mpq_brevitas.apply(carrying, plan.with_activations({"conv1": Activations(4)}))


def test_there_is_nothing_to_calibrate_without_quantized_activations() -> None:
    with pytest.raises(SettingError, match="no layer quantizes its inputs; convert with activation_bits=8"):
        mpq_brevitas.calibrate(converted()[2], BATCHES)


@pytest.mark.parametrize("tune", [*TUNERS, "correct_bias", "train", "calibrate"])
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches: none given"),
        (torch.zeros(4, 3, 8, 8), "batches: a single tensor is one batch; give a list"),
        ({"x": torch.zeros(4, 3, 8, 8)}, "batches: dict is no series of inputs"),
        (None, "batches: NoneType is no series of inputs"),
        ([torch.zeros(4, 3, 8, 8), torch.zeros(0, 3, 8, 8)], r"number 2 of 2 is empty, \(0, 3, 8, 8\)"),
        ([torch.full((4, 3, 8, 8), torch.nan)], "number 1 of 1 has values that are NaN or infinite"),
        ([torch.full((4, 3, 8, 8), torch.inf)], "number 1 of 1 has values that are NaN or infinite"),
        (
            [(torch.zeros(4, 3, 8, 8), torch.zeros(4))],
            r"batch of \(\(4, 3, 8, 8\), \(4,\)\).*without labels",
        ),
        ([torch.zeros(2, 5, 8, 8)], r"SmallNet does not run on a batch of \(2, 5, 8, 8\)"),
    ],
)
def test_batches_that_a_model_cannot_take(tune: str, batches: list[Tensor], message: str) -> None:
    model = nets.made(nets.SmallNet)
    quantized = mpq_brevitas.to_brevitas(model, planned(model), activation_bits=8)
    if tune != "calibrate":
        quantized = mpq_brevitas.calibrate(quantized, BATCHES)
    more = {"loss": mpq_brevitas.distillation(model)} if tune == "train" else {}
    with pytest.raises(SettingError, match=message):
        getattr(mpq_brevitas, tune)(quantized, batches, **more)


@pytest.mark.parametrize("tune", TUNERS)
def test_layers_that_are_left_alone_are_named(tune: str) -> None:
    model = nets.made(EveryKind)
    plan = planned(model, allocator=Uniform(bits=3))
    quantized = mpq_brevitas.to_brevitas(model, plan)
    left = "'embed'" if tune == "learned_round" else "'embed', 'up1', 'up2', 'up3'"
    with pytest.warns(UserWarning, match=f"leaves {left} as they were"):
        tuned = TUNERS[tune](quantized, [TOKENS])
    assert codes(tuned)["embed"].equal(codes(quantized)["embed"])
    mpq_brevitas.verify_tuned(tuned, plan)


class Deep(nn.Module):
    """A linear layer on four dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x)
        return logits


@pytest.mark.parametrize("tune", [*TUNERS, "correct_bias"])
def test_linear_layers_that_brevitas_would_read_wrongly_are_refused(tune: str) -> None:
    model = Deep().eval()
    quantized = mpq_brevitas.to_brevitas(model, planned(model))
    with pytest.raises(SettingError, match="layer 'fc' works on 4 dimensions"):
        getattr(mpq_brevitas, tune)(quantized, [torch.randn(2, 3, 5, 6)])


@pytest.mark.parametrize(
    ("blocks", "message"),
    [(["layer1.0"], "'layer1.0' match no module"), (["conv?", "fc.*"], r"'fc\.\*' match no module")],
)
def test_a_glob_that_matches_nothing_is_refused(blocks: list[str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        mpq_brevitas.learned_round(converted()[2], BATCHES, blocks=blocks)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"steps": 2.5}, {"lr": 0.0}, {"lr": -1.0}, {"lr": "x"}])
def test_learned_rounding_wants_steps_and_a_rate(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="steps must be 1 or more, and lr above 0"):
        mpq_brevitas.learned_round(converted()[2], BATCHES, **settings)


class Nested(nn.Module):
    """Two blocks of two layers and a head, in module names with dots."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)) for _ in range(2)))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


def test_dotted_globs_choose_blocks_and_the_rest_are_layers() -> None:
    torch.manual_seed(0)
    model = Nested().eval()
    quantized = mpq_brevitas.to_brevitas(model, planned(model, allocator=Uniform(bits=2)))
    told: list[tuple[str, int, int]] = []
    mpq_brevitas.learned_round(
        quantized, [torch.randn(64, 6)], blocks="body.?", steps=20, progress=lambda *what: told.append(what)
    )
    assert told == [("body.0", 0, 3), ("body.1", 1, 3), ("head", 2, 3), ("done", 3, 3)]


class Pair(nn.Module):
    """A block that gives two things."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.fc(x)}


class WithPair(nn.Module):
    """A network of one such block."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Pair()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)["y"]  # type: ignore[no-any-return]


def test_a_block_whose_output_is_no_tensor_is_refused() -> None:
    model = WithPair().eval()
    quantized = mpq_brevitas.to_brevitas(model, planned(model))
    with pytest.raises(MismatchError, match="a block gives a dict, no tensor"):
        mpq_brevitas.learned_round(quantized, [torch.randn(8, 6)], blocks=["block"])


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    _, _, quantized = converted()
    for tune in TUNERS.values():
        tune(quantized, BATCHES)
    assert capfd.readouterr() == ("", "")


def test_training_brings_the_model_closer_and_leaves_everything_trainable() -> None:
    model, plan, quantized = converted()
    told: list[tuple[str, int, int]] = []
    trained = mpq_brevitas.train(
        quantized,
        BATCHES,
        mpq_brevitas.distillation(model),
        epochs=20,
        lr=1e-3,
        progress=lambda *what: told.append(what),
    )
    mpq_brevitas.verify_tuned(trained, plan)
    assert error(trained, model) < error(quantized, model)
    assert told[-1] == ("training", 60, 60)
    assert all(parameter.requires_grad for parameter in trained.parameters())
    assert not trained.conv2.weight_quant.scale().equal(quantized.conv2.weight_quant.scale())
    assert trained.bn1.running_mean.equal(model.bn1.running_mean)


def test_after_learned_rounding_a_loop_of_ones_own_trains_every_parameter() -> None:
    _, _, quantized = converted()
    rounded = mpq_brevitas.learned_round(quantized, BATCHES, steps=5)
    rounded(BATCHES[0]).square().sum().backward()
    assert [name for name, parameter in rounded.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("settings", [{"epochs": 0}, {"epochs": 1.5}, {"lr": 0.0}])
def test_training_wants_epochs_and_a_rate(settings: dict[str, Any]) -> None:
    model, _, quantized = converted()
    with pytest.raises(SettingError, match="epochs must be 1 or more, and lr above 0"):
        mpq_brevitas.train(quantized, BATCHES, mpq_brevitas.distillation(model), **settings)


def test_a_loss_that_is_no_number_stops_training() -> None:
    _, _, quantized = converted()
    with pytest.raises(WeightError, match="the loss is nan at step 1 of 12"):
        mpq_brevitas.train(quantized, BATCHES, lambda model, batch: model(batch).sum() * torch.nan)


@pytest.mark.parametrize("tune", [*TUNERS, "correct_bias"])
def test_a_model_that_is_not_quantized_is_refused(tune: str) -> None:
    with pytest.raises(SettingError, match="no layer is quantized; convert it with to_brevitas"):
        getattr(mpq_brevitas, tune)(nets.made(nets.SmallNet), BATCHES)


def batches_once() -> Iterator[Tensor]:
    yield from BATCHES


def test_batches_may_be_a_generator_tuples_or_keywords() -> None:
    _, _, quantized = converted()
    expected = codes(mpq_brevitas.gptq(quantized, BATCHES))
    for batches in (batches_once(), [(batch,) for batch in BATCHES], [{"x": batch} for batch in BATCHES]):
        found = codes(mpq_brevitas.gptq(quantized, batches))
        assert all(found[name].equal(expected[name]) for name in expected)


def test_copies_of_a_tuned_model_are_models_of_their_own() -> None:
    _, _, quantized = converted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned = mpq_brevitas.gptq(quantized, BATCHES)
    copied = copy.deepcopy(tuned)
    with torch.no_grad():
        copied.fc.weight.zero_()
        assert not copied(BATCHES[0]).equal(tuned(BATCHES[0]))
