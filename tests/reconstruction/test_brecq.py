"""Reconstruction end to end on small nets: the laws that hold for any model and any affine plan."""

import copy
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpq_plugins as mpq
from mpq_plugins import (
    Affine,
    BlockReport,
    EntropyCoded,
    MismatchError,
    Piecewise,
    SettingError,
    SourceError,
    WeightError,
)
from mpq_plugins.plans.scheme import Scheme
from mpq_plugins.simulation.integers import integer_weight
from tests.helpers.nets import conv_net, tied_net
from tests.helpers.plans import fits, with_layer

pytestmark = pytest.mark.usefixtures("one_thread")

CLIPPED = Affine(granularity="per_channel", range="mse")


class Residual(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.bn1(self.conv1(x)))) + x)


class ResNet(nn.Module):
    """A stem, two residual blocks and a head; (N, 3, 6, 6) -> (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.Sequential(Residual(6), Residual(6))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))
        return logits


def resnet() -> ResNet:
    torch.manual_seed(3)
    return ResNet().eval()


def inputs(count: int = 4, size: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 3, size, size, generator=generator) for _ in range(count)]


def plan_of(net: nn.Module, bits: int = 2, scheme: Scheme = CLIPPED) -> mpq.Plan:
    return mpq.Uniform(bits=bits)(mpq.measure(net, scheme, (bits,)))


def learn(net: nn.Module, plan: mpq.Plan, batches: Any = None, steps: int = 40, **settings: Any) -> nn.Module:
    given = inputs() if batches is None else batches
    return mpq.reconstruct(net, plan, given, steps=steps, batch_size=8, lr=0.02, **settings)


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, others = one.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(mine[name].equal(others[name]) for name in mine)


SCHEMES: list[Scheme] = [Affine(symmetric=s, granularity=g, range=r) for s in (False, True)
                         for g in ("per_tensor", "per_channel") for r in ("minmax", "mse")]  # fmt: skip
SCHEMES += [Affine(symmetric="full", granularity="per_channel", scale_dtype="float16", range=r) for r in
            ("minmax", "mse")]  # fmt: skip
CODED: list[Scheme] = [EntropyCoded(), EntropyCoded(step=0.35), EntropyCoded(step=0.3, rounding_offset=0.5)]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 2, 5])
@pytest.mark.parametrize("scheme", [*SCHEMES, *CODED], ids=str)
def test_the_plan_finds_the_learned_codes_in_the_result(scheme: Scheme, bits: int) -> None:
    net = conv_net()
    if not fits(net, scheme, bits):
        return
    plan = plan_of(net, bits, scheme)
    before = copy.deepcopy(net.state_dict())
    learned = learn(net, plan, inputs(size=8), steps=6)
    assert same(mpq.apply(learned, plan), learned)
    mpq.verify(learned, plan, learned)
    for name, choice in plan.by_name.items():
        weight = learned.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        assert integer_weight(weight, choice).dequantized().equal(weight)
    assert all(before[name].equal(value) for name, value in net.state_dict().items())


def test_every_part_has_its_own_levels() -> None:
    net = resnet()
    plan = with_layer(
        plan_of(net, 3), "blocks.1.conv2", bits=None,
        parts=({"bits": 1, "channels": (0, 3)}, {"bits": 4, "channels": (1, 2)}, {"bits": 16, "channels": (4, 5)}),
    )  # fmt: skip
    learned = learn(net, plan)
    assert same(mpq.apply(learned, plan), learned)
    checks = {(check.layer, check.bits): check.values for check in mpq.verify(learned, plan)}
    assert checks["blocks.1.conv2", 1] == 2
    weight = learned.get_submodule("blocks.1.conv2").weight
    assert isinstance(weight, Tensor)
    assert weight[4:].equal(net.blocks[1].conv2.weight[4:].half().float())  # type: ignore[union-attr,index]


@pytest.mark.slow
def test_blocks_come_closer_to_the_float_net_and_never_farther() -> None:
    net, batches = resnet(), inputs()
    plan = plan_of(net)
    reports: list[BlockReport] = []
    learned = learn(net, plan, batches, steps=150, finished=reports.append)
    assert [report.name for report in reports] == ["stem", "blocks.0", "blocks.1", "head"]
    assert [report.layers for report in reports][1] == ("blocks.0.conv1", "blocks.0.conv2")
    assert all(report.learned <= report.nearest for report in reports)
    assert sum(report.changed for report in reports) > 0

    def error(quantized: nn.Module) -> float:
        x = torch.cat(batches)
        with torch.no_grad():
            return float((quantized(x) - net(x)).square().sum())

    assert error(learned) < 0.7 * error(mpq.apply(net, plan))


def test_the_reported_losses_are_the_blocks_errors() -> None:
    net, batches = resnet(), inputs()
    plan = plan_of(net)
    reports: list[BlockReport] = []
    learned = learn(net, plan, batches, finished=reports.append)
    x = torch.cat(batches)
    with torch.no_grad():
        difference = learned.stem(x) - net.stem(x)  # type: ignore[operator]
        nearest = mpq.apply(net, plan).stem(x) - net.stem(x)  # type: ignore[operator]
    # Summed over channels, averaged over samples and positions.
    assert reports[0].learned == pytest.approx(float(difference.square().sum(1).mean()), rel=1e-4)
    assert reports[0].nearest == pytest.approx(float(nearest.square().sum(1).mean()), rel=1e-4)


def test_learning_that_goes_wrong_leaves_rounding_to_nearest() -> None:
    net, reports = resnet(), list[BlockReport]()
    plan = plan_of(net, 6)
    # So strong a regulariser decides without looking at the output.
    learned = mpq.reconstruct(net, plan, inputs(), steps=5, lr=5.0, regulariser=1e6, finished=reports.append)
    kept = [report for report in reports if report.learned == report.nearest]
    assert kept
    nearest = mpq.apply(net, plan)
    for report in kept:
        assert report.changed == 0
        for layer in report.layers:
            mine, others = (n.get_submodule(layer).weight for n in (learned, nearest))
            assert isinstance(mine, Tensor)
            assert isinstance(others, Tensor)
            assert torch.allclose(mine, others, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"mix": 0.5}, {"loss": "fisher"}, {"tune": "norms"}, {"correct": True}, {"blocks": "blocks"}]
)
def test_a_seed_decides_everything(settings: dict[str, Any]) -> None:
    net = resnet()
    plan = plan_of(net)
    first, again, other = (learn(net, plan, seed=seed, **settings) for seed in (5, 5, 6))
    assert same(first, again)
    assert not same(first, other)
    assert same(mpq.apply(first, plan), first)


class StoppedError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"tune": "norms", "mix": 0.3, "correct": True}])
def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path: Path, settings: dict[str, Any]) -> None:
    net, place = resnet(), tmp_path / "out.partial"
    plan = plan_of(net)
    whole = learn(net, plan, **settings)

    def stop(name: str, done: int, total: int) -> None:
        if name == "blocks.1" and done > 80:
            raise StoppedError

    with pytest.raises(StoppedError):
        learn(net, plan, steps=80, store=place, progress=stop, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    reports: list[BlockReport] = []
    with suppress(StoppedError), mpq.Store(place) as store:
        resumed = learn(net, plan, steps=80, store=store, finished=reports.append, **settings)
        raise StoppedError  # before the model is saved
    assert [report.resumed for report in reports] == [True, True, False, False]
    assert same(resumed, learn(net, plan, steps=80, **settings))
    assert not same(resumed, whole)
    again = learn(net, plan, steps=80, store=place, finished=reports.append, **settings)
    assert [report.resumed for report in reports[4:]] == [True] * 4
    assert same(again, resumed)
    assert list(tmp_path.iterdir()) == []


def left_by(place: Path, net: nn.Module, plan: mpq.Plan) -> Path:
    """A store that a run left which was interrupted before its result was saved."""
    with suppress(StoppedError), mpq.Store(place) as store:
        learn(net, plan, steps=2, store=store)
        raise StoppedError
    return place


@pytest.mark.slow
def test_a_store_of_another_job_is_refused(tmp_path: Path) -> None:
    net = resnet()
    place = left_by(tmp_path / "out.partial", net, plan_of(net))
    for changed, fact in (({"steps": 3}, "settings"), ({"seed": 1}, "settings"), ({"batches": inputs(3)}, "batches")):
        with pytest.raises(SettingError, match=rf"holds what another job finished \(it differs in {fact}\)"):
            learn(net, plan_of(net), **{"steps": 2, "store": place} | changed)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"holds what another job finished \(it differs in plan\)"):
        learn(net, plan_of(net, 3), steps=2, store=place)


def test_what_spills_to_disk_changes_nothing(tmp_path: Path) -> None:
    net = resnet()
    plan = plan_of(net)
    seen: set[str] = set()

    def look(name: str, done: int, total: int) -> None:
        seen.update(path.name.partition("-cache-")[0] for path in tmp_path.iterdir() if path.is_dir())

    spilled = learn(net, plan, memory=0, mix=0.5, store=tmp_path / "out.partial", progress=look)
    assert same(spilled, learn(net, plan, mix=0.5))
    assert seen == {"out.partial"}
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_all_steps() -> None:
    said: list[tuple[str, int, int]] = []
    net = resnet()
    learn(net, plan_of(net), steps=120, progress=lambda *words: said.append(words))
    assert said[0] == ("stem", 0, 480)
    assert said[-1] == ("", 480, 480)
    assert [done for _, done, _ in said] == sorted(done for _, done, _ in said)
    assert {name for name, _, _ in said} == {"stem", "blocks.0", "blocks.1", "head", ""}


def test_tied_weights_stay_tied_and_embeddings_go_to_nearest() -> None:
    net = tied_net()
    plan = plan_of(net, 3, Affine(granularity="per_channel"))
    tokens = [torch.randint(20, (8, 5), generator=torch.Generator().manual_seed(k)) for k in range(3)]
    reports: list[BlockReport] = []
    learned = learn(net, plan, tokens, steps=30, finished=reports.append)
    assert [report.name for report in reports] == ["block"]
    assert learned.embed.weight is learned.lm_head.weight  # type: ignore[union-attr]
    assert same(mpq.apply(learned, plan), learned)
    nearest = mpq.apply(net, plan)
    pair = [n.get_submodule("embed").weight for n in (learned, nearest)]
    assert torch.allclose(pair[0], pair[1], rtol=1e-6)  # type: ignore[arg-type]


class Encoder(nn.Module):
    """Two transformer layers with a padding mask, mean-pooled; called by keywords."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.batch_first = batch_first

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(tokens)
        hidden: Tensor = self.encoder(x if self.batch_first else x.transpose(0, 1), src_key_padding_mask=mask)
        return hidden.mean(1 if self.batch_first else 0)


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_layers_are_blocks_with_masks_and_uneven_batches(batch_first: bool) -> None:
    torch.manual_seed(0)
    net = Encoder(batch_first).eval()
    plan = plan_of(net, 2, Affine(granularity="per_channel"))
    generator = torch.Generator().manual_seed(0)
    batches = []
    for length in (4, 7, 4):
        mask = torch.zeros(6, length, dtype=torch.bool)
        mask[1, -1] = True
        batches.append({"tokens": torch.randint(30, (6, length), generator=generator), "mask": mask})
    reports: list[BlockReport] = []
    learned = learn(net, plan, batches, steps=150, finished=reports.append)
    assert [report.name for report in reports] == ["encoder.layers.0", "encoder.layers.1"]
    assert "encoder.layers.0.self_attn.out_proj" in reports[0].layers
    assert all(report.learned < report.nearest for report in reports)
    assert same(mpq.apply(learned, plan), learned)


@pytest.mark.slow
def test_activations_are_quantized_in_ranges_that_are_learned() -> None:
    net = resnet()
    plan = plan_of(net, 4).with_activation_bits(3)
    reports: list[BlockReport] = []
    learned = learn(net, plan, steps=100, finished=reports.append)
    ranges = mpq.input_ranges(learned)
    assert set(ranges) == set(plan.by_name)
    assert all(own.bits == 3 and own.scale > 0 for own in ranges.values())
    assert all(report.learned <= report.nearest for report in reports)
    values: list[Tensor] = []
    layer = learned.get_submodule("blocks.0.conv2")
    handle = layer.register_forward_pre_hook(lambda _, args: values.append(args[0]))
    with torch.no_grad():
        learned(inputs()[0])
    handle.remove()
    assert len(values[0].unique()) <= 8
    carried = mpq.with_input_ranges(mpq.without_input_ranges(learned), ranges)
    with torch.no_grad():
        expected = learned(inputs()[0])
        assert mpq.apply(learned, plan)(inputs()[0]).equal(expected)
        assert carried(inputs()[0]).equal(expected)
        assert not mpq.without_input_ranges(learned)(inputs()[0]).equal(expected)


class Deciding(nn.Module):
    """Runs its block or not by what the values are."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        on_the_grid = len(self.first.weight.unique()) <= 2
        result: Tensor = x if on_the_grid else self.second(x)
        return result


class Stateful(nn.Module):
    """A block that gives something else each time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        result: Tensor = self.layer(x) * self.calls
        return result


class Unused(nn.Module):
    """A layer that is borrowed rather than called."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.borrowed = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.own(x) @ self.borrowed.weight
        return result


@pytest.mark.parametrize(
    ("make", "blocks", "said"),
    [
        (Deciding, (), "block 'second': the quantized model calls it 0 times on a batch and the float one 1 times"),
        (
            lambda: nn.Sequential(Stateful(), nn.Linear(4, 4)),
            "0",
            "block '0': gives something else when it is run again",
        ),
        (Unused, (), "'borrowed': no batch reaches it, or it is used without being called"),
    ],
)
def test_blocks_that_cannot_be_captured_are_named(make: Callable[[], nn.Module], blocks: Any, said: str) -> None:
    torch.manual_seed(0)
    net = make().eval()
    plan = plan_of(net, 1, Affine())
    with pytest.raises(SettingError, match=said):
        learn(net, plan, [torch.randn(8, 4)], blocks=blocks)


def test_a_loss_that_is_nan_names_its_block_and_keeps_the_others(tmp_path: Path) -> None:
    net = resnet()
    plan = plan_of(net)
    with torch.no_grad():
        net.get_parameter("blocks.1.bn1.bias")[0] = 1e30
    with pytest.raises((SettingError, WeightError), match=r"block 'blocks\.1'"):
        learn(net, plan, store=tmp_path / "out.partial")
    with mpq.Store(tmp_path / "out.partial") as store:
        assert len(store) == 2


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"batches": []}, SettingError, "batches: none given"),
        ({"batches": torch.zeros(2, 3, 6, 6)}, SettingError, "a single tensor is one batch"),
        ({"batches": [torch.zeros(2, 4, 6, 6)]}, SettingError, "ResNet does not run on a batch"),
        ({"plan": plan_of(conv_net())}, MismatchError, "made for another model"),
        ({"plan": plan_of(resnet(), 3, Piecewise())}, SettingError, "layer 'stem': rounding is learned between"),
        ({"net": resnet().double()}, SourceError, "float64"),
        ({"net": resnet().bfloat16()}, SettingError, "layer 'stem': torch.bfloat16"),
        ({"net": resnet().train()}, SettingError, "'ResNet' is in training mode"),
        ({"device": "cuda:7"}, SettingError, "device: 'cuda:7' cannot be used"),
        ({"device": "nowhere"}, SettingError, "device: 'nowhere' cannot be used"),
        ({"memory": -1}, SettingError, "memory: -1 is not allowed"),
        ({"blocks": "layer9"}, SettingError, "blocks: 'layer9' match no module"),
        ({"steps": 0}, SettingError, "steps: 0 is not allowed"),
    ],
)
def test_bad_input_is_refused_before_any_work(changes: dict[str, Any], error: type[Exception], said: str) -> None:
    given = {"net": resnet(), "plan": plan_of(resnet()), "steps": 2} | changes
    with pytest.raises(error, match=said):
        learn(**given)  # type: ignore[arg-type]


class Windows(nn.Module):
    """A block in a list whose rows meet masks by where they stand, as in a Swin transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("masks", torch.tensor([[1.0], [-1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        masks = self.get_buffer("masks").repeat(len(x) // 2, 1)
        result: Tensor = self.second(torch.relu(self.first(x))) * masks
        return result


def test_rows_that_meet_masks_by_their_position_are_never_mixed() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Windows()).eval()
    reports: list[BlockReport] = []
    plan = plan_of(net, 8, Affine(granularity="per_channel"))
    learn(net, plan, [torch.randn(16, 4) for _ in range(3)], steps=100, finished=reports.append)
    # At 8 bits hardly anything is lost; rows that met another's mask would be far off.
    assert reports[0].learned < 1e-3


class Counting(nn.Module):
    """A block that counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        result: Tensor = self.second(torch.relu(self.first(x)))
        return result


def test_runs_leave_no_trace_in_buffers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Counting(), Counting()).eval()
    learned = learn(net, plan_of(net, 3, Affine()), [torch.randn(8, 6)], steps=5)
    assert [float(value) for name, value in learned.state_dict().items() if "calls" in name] == [0, 0]


def test_it_learns_inside_the_users_own_no_grad() -> None:
    net = resnet()
    plan = plan_of(net)
    expected = learn(net, plan, steps=5)
    with torch.no_grad():
        assert same(learn(net, plan, steps=5), expected)
    with torch.inference_mode():
        assert same(learn(net, plan, steps=5), expected)


def test_another_architecture_with_the_same_weights_is_another_job(tmp_path: Path) -> None:
    first, second = resnet(), resnet()
    second.blocks[0].conv1.padding_mode = "circular"  # type: ignore[union-attr]
    plan = plan_of(first)
    place = left_by(tmp_path / "out.partial", first, plan)
    with pytest.raises(SettingError, match=r"holds what another job finished \(it differs in architecture\)"):
        learn(second, plan, steps=2, store=place)


def test_a_parameter_with_an_earlier_name_and_a_shared_norm_are_set() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Parameter(torch.randn(6, 6))
            self.fc = nn.Linear(6, 6)
            self.fc.weight = self.shared

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.fc(x)
            return result

    torch.manual_seed(0)
    net = Shared().eval()
    plan = plan_of(net, 3, Affine(granularity="per_channel"))
    learned = learn(net, plan, [torch.randn(16, 6)], steps=30)
    assert same(mpq.apply(learned, plan), learned)
    one = nn.LayerNorm(6)
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), one, nn.Linear(6, 6)) for _ in range(2))).eval()
    tuned = learn(blocks, plan_of(blocks, 3, Affine()), [torch.randn(16, 6)], steps=30, tune="norms", blocks=["0", "1"])
    assert tuned.get_parameter("0.1.weight").equal(one.weight)


def test_verify_and_apply_tell_other_activation_bits() -> None:
    net = resnet()
    plan = plan_of(net, 4).with_activation_bits(8)
    learned = learn(net, plan, steps=3)
    mpq.verify(learned, plan)
    other = plan.with_activation_bits(2)
    with pytest.raises(mpq.VerifyError, match=r"'stem' has inputs of 8 bits \(static\), the plan 2"):
        mpq.verify(learned, other)
    with pytest.raises(mpq.SettingError, match="carries ranges of inputs that are not the plan's"):
        mpq.apply(learned, other)
    assert mpq.input_ranges(learned.state_dict()) == mpq.input_ranges(learned)


def test_folded_results_are_in_evaluation_mode_and_can_be_learned_again() -> None:
    net = conv_net()
    plan = plan_of(net, 4, Affine())
    assert plan.fold_bn
    learned = learn(net, plan, inputs(size=8), steps=3)
    assert not any(module.training for module in learned.modules())
    assert all(parameter.requires_grad for parameter in learned.parameters())
    learn(learned, plan, inputs(size=8), steps=3)


class Experts(nn.Module):
    """Rows go to one of three experts by their sign; one never gets any."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for own, rows in zip(self.experts, (x[:, 0] > 0, x[:, 0] <= 0, x[:, 0] > 99), strict=True):
            result[rows] = own(x[rows])
        return result


def test_an_expert_that_gets_no_sample_is_named() -> None:
    torch.manual_seed(0)
    net = Experts().eval()
    plan = plan_of(net, 3, Affine(granularity="per_channel"))
    with pytest.raises(SettingError, match=r"block 'experts\.2\.0': no batch reaches it"):
        learn(net, plan, [torch.randn(16, 4)], steps=3)
    whole = nn.Sequential(net).eval()
    plan = plan_of(whole, 3, Affine())
    mpq.verify(learn(whole, plan, [torch.randn(16, 4)], steps=3, blocks="0"), plan)
