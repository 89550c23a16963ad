"""Compensation end to end on small nets: the laws that hold for any model, any plan and any scheme."""

import threading
import warnings
from collections import UserDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpq_plugins as mpq
from mpq_plugins import Affine, Codebook, LayerReport, MismatchError, Piecewise, SettingError, WeightError
from mpq_plugins.cli.demo.net import calibration_digits, digit_net, unseen_digits
from mpq_plugins.models.folding import fold_batch_norm
from mpq_plugins.plans.scheme import Scheme
from mpq_plugins.quantization.contract import PartShape
from mpq_plugins.quantization.quantize import quantizer
from mpq_plugins.reconstruction.round_layer import LayerRounding
from mpq_plugins.simulation.integers import integer_weight
from tests.helpers.nets import conv_net, tied_net
from tests.helpers.plans import with_layer
from tests.helpers.says import names, naming

pytestmark = pytest.mark.usefixtures("one_thread")

CLIPPED = Affine(granularity="per_channel", range="mse")
IMAGES = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(2)) + 0.3
ROWS = torch.randn(300, 8, generator=torch.Generator().manual_seed(3)) + 0.5
SCHEMES: list[Scheme] = [
    *(Affine(symmetric=s, granularity=g, range=r) for s in (False, True) for g in ("per_tensor", "per_channel")
      for r in ("minmax", "mse")),
    Affine(granularity="per_group", group_size=2), Affine(granularity="per_group", group_size=2, range="mse"),
    Affine(symmetric="full", granularity="per_channel"), Affine(symmetric="full", range="mse", scale_dtype="float16"),
    Affine(granularity="per_channel", scale_dtype="float16"),
    Codebook(), Codebook(init="linear"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def plan_of(net: nn.Module, bits: int = 2, scheme: Scheme = CLIPPED, **options: Any) -> mpq.Plan:
    return mpq.Uniform(bits=bits)(mpq.measure(net, scheme, (bits,), **options))


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, others = one.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(mine[name].equal(others[name]) for name in mine)


def weight_of(net: nn.Module, name: str) -> Tensor:
    weight = net.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def seeded(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(*layers).eval()
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
    return net


def seen_by(net: nn.Module) -> list[Any]:
    """All of a model that a call could change."""
    return [
        {name: (value.clone(), id(value), value.requires_grad) for name, value in net.named_parameters()},
        {name: (value.clone(), id(value)) for name, value in net.named_buffers()},
        [(name, id(module), module.training, list(module._forward_hooks), list(module._forward_pre_hooks))
         for name, module in net.named_modules()],
    ]  # fmt: skip


@contextmanager
def unchanged(net: nn.Module) -> Iterator[None]:
    before = seen_by(net)
    yield
    after = seen_by(net)
    for own, others in zip(before[:2], after[:2], strict=True):
        assert own.keys() == others.keys()
        for name in own:
            assert own[name][0].equal(others[name][0])
            assert own[name][1:] == others[name][1:]
    assert before[2] == after[2]


def compensated(
    net: nn.Module,
    plan: mpq.Plan,
    batches: Sequence[Any],
    nearest: Sequence[str] = (),
    better: Sequence[str] = (),
    **options: Any,
) -> tuple[nn.Module, dict[str, LayerReport]]:
    """The copy and the reports, and what holds of all: the model stays, weights are found again, all is reported.

    nearest: layers that are to be rounded to nearest, as a warning says; better: for which that is better, unsaid.
    """
    reports: list[LayerReport] = []
    with unchanged(net), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = mpq.compensate(net, plan, batches, finished=reports.append, **options)
    texts = [str(warning.message) for warning in said]
    assert [text for text in texts if "rounded to nearest" not in text] == []
    assert len(texts) == bool(nearest)
    assert all(names(text, repr(name)) for text in texts for name in nearest)
    assert all(warning.filename == __file__ for warning in said)
    by_name = {report.name: report for report in reports}
    assert len(by_name) == len(reports)
    quantized = mpq.apply(made, plan)
    mpq.verify(quantized, plan, made)
    for name, report in by_name.items():
        assert report.rounding == ("nearest" if name in (*nearest, *better) else "compensated")
        if report.rounding == "compensated":
            assert report.why == ""
            assert report.compensated <= report.nearest
            assert weight_of(quantized, name).equal(weight_of(made, name))
    return made, by_name


def check_integers(made: nn.Module, plan: mpq.Plan) -> None:
    """The codes of backends stand for the weights, to the bit."""
    for name, choice in plan.by_name.items():
        assert integer_weight(weight_of(made, name), choice).dequantized().equal(weight_of(made, name))


# ---- schemes


@pytest.mark.parametrize("bits", [1, 2, 5])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_plan_finds_the_rounded_weights_in_the_result(scheme: Scheme, bits: int, tmp_path: Path) -> None:
    net, bits = conv_net(), min(bits, 3) if isinstance(scheme, Codebook) else bits
    skip = ["conv1", "fc"] if scheme.granularity == "per_group" else []
    plan = mpq.Uniform(bits=bits)(mpq.measure(net, scheme, (bits,), skip=skip))
    reports: list[LayerReport] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a layer is better rounded to nearest, as it may be
        made = mpq.compensate(net, plan, [IMAGES], finished=reports.append)
    done = [report.name for report in reports if report.rounding == "compensated"]
    assert len(done) >= len(plan.layers) - 1
    quantized = mpq.apply(made, plan)
    mpq.compress(made, plan, tmp_path / "net.mpqz")
    stored = mpq.decompress(tmp_path / "net.mpqz")
    for name in done:
        weight = weight_of(made, name)
        assert weight_of(quantized, name).equal(weight)
        assert stored[f"{name}.weight"].equal(weight)
        if scheme.as_affine is not None:
            assert integer_weight(weight, plan.by_name[name]).dequantized().equal(weight)
    mpq.verify(quantized, plan, made)


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_blocks_keep_their_scales_and_the_layer_its_own(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, scheme = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)), mpq.Minifloat(format=kind)
    with torch.no_grad():
        weight_of(net, "0")[3, 29] = 3  # the greatest, in a block of columns that is rounded late
    plan = mpq.Uniform(bits=4)(mpq.measure(net, scheme, (4,)))
    reports: list[LayerReport] = []
    made = mpq.compensate(net, plan, [torch.randn(400, 32) @ torch.randn(32, 32)], finished=reports.append)
    assert [report.rounding for report in reports] == ["compensated"] * 2
    assert all(report.compensated < report.nearest and report.changed for report in reports)
    quantized = mpq.apply(made, plan)
    mpq.compress(made, plan, tmp_path / "net.mpqz")
    stored = mpq.decompress(tmp_path / "net.mpqz")
    for name in ("0", "2"):
        weight, part = weight_of(made, name), PartShape(tuple(weight_of(net, name).shape), 0, 4, scheme, name)
        assert weight_of(quantized, name).equal(weight)
        assert stored[f"{name}.weight"].equal(weight)
        tables = [quantizer(scheme).encode(values, part).tables for values in (weight, weight_of(net, name).detach())]
        assert tables[0] == pytest.approx(tables[1], rel=3e-7)  # the scales of the float weights, but for float32
    mpq.verify(quantized, plan, made)


@pytest.mark.parametrize("scheme", [Piecewise(granularity="per_channel"), Piecewise(granularity="per_channel",
                                    storage="shared"), Piecewise()], ids=str)  # fmt: skip
def test_channels_whose_regions_are_not_found_again_keep_their_float_weights(scheme: Scheme) -> None:
    net = conv_net()
    plan = plan_of(net, 3, scheme)
    reports: list[LayerReport] = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = mpq.compensate(net, plan, [IMAGES], finished=reports.append)
    quantized, nearest = mpq.apply(made, plan), mpq.apply(net, plan)
    for report in reports:
        axis = plan.by_name[report.name].channel_axis
        kept, used, float_weight, near = (
            weight_of(model, report.name).movedim(axis, 0).flatten(1) for model in (made, quantized, net, nearest)
        )
        if report.rounding == "nearest":
            assert kept.equal(float_weight)
            assert any(names(warning.message, repr(report.name)) for warning in said)
        for own, after, before, rounded in zip(kept, used, float_weight, near, strict=True):
            assert own.equal(after) or (own.equal(before) and after.equal(rounded))


def test_parts_have_their_own_levels() -> None:
    net = conv_net()
    plan = with_layer(
        plan_of(net, 3), "conv2", bits=None,
        parts=({"bits": 1, "channels": (0, 3, 4)}, {"bits": 4, "channels": (1, 2, 5, 6, 7)},
               {"bits": 16, "channels": (8, 9)}, {"bits": 32, "channels": (10, 11)}),
    )  # fmt: skip
    made, reports = compensated(net, plan, [IMAGES])
    assert same(mpq.apply(made, plan), made)
    checks = {(check.layer, check.bits): check.values for check in mpq.verify(made, plan)}
    assert checks["conv2", 1] == 2
    assert weight_of(made, "conv2")[8:10].equal(weight_of(net, "conv2")[8:10].half().float())
    assert weight_of(made, "conv2")[10:].equal(weight_of(net, "conv2")[10:])
    assert set(reports) == {"conv1", "conv2", "up", "fc"}


def test_layers_in_float_are_left_alone() -> None:
    net = conv_net()
    plan = with_layer(plan_of(net, 3), "conv2", bits=32)
    made, reports = compensated(net, plan, [IMAGES])
    assert set(reports) == {"conv1", "up", "fc"}
    assert weight_of(made, "conv2").equal(weight_of(net, "conv2"))


# ---- what it is good for


def error(net: nn.Module, exact: nn.Module, given: Tensor) -> float:
    with torch.no_grad():
        return float((net(given) - exact(given)).square().mean())


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("scheme", [CLIPPED, Affine(granularity="per_channel"), Codebook()], ids=str)
def test_outputs_on_unseen_inputs_are_nearer_to_the_float_nets(scheme: Scheme, bits: int) -> None:
    net, batches = digit_net(), calibration_digits()
    plan = plan_of(net, bits, scheme)
    made, _ = compensated(net, plan, batches)
    images = unseen_digits()[0]
    nearest = mpq.apply(mpq.correct(net, plan, batches), plan)
    assert error(mpq.apply(made, plan), net, images) < 0.8 * error(nearest, net, images)


def test_reported_errors_are_those_of_the_first_layers_outputs() -> None:
    """The first layer's inputs are the same in both nets, so its target is its own weights."""
    net = conv_net()
    plan = plan_of(net, 3)
    made, reports = compensated(net, plan, [IMAGES])
    report = reports["conv1"]
    assert report.columns == 48 * 64
    assert report.weights == 8 * 27
    near = mpq.apply(net, plan)
    for rounded, said in ((near, report.nearest), (made, report.compensated)):
        lost = F.conv2d(IMAGES, weight_of(rounded, "conv1") - weight_of(net, "conv1"), padding=1)
        assert said == pytest.approx(float(lost.square().sum(1).mean()), rel=1e-3)
    assert report.changed == int((weight_of(near, "conv1") != weight_of(made, "conv1")).sum())


def test_a_seed_decides_everything() -> None:
    net = conv_net()
    plan, options = plan_of(net), dict[str, Any](columns=1)
    first, again, other = (compensated(net, plan, [IMAGES], seed=seed, **options)[0] for seed in (5, 5, 6))
    assert same(first, again)
    assert not same(first, other)


def test_batches_are_one_set_however_they_are_cut() -> None:
    """Where all positions are looked at; sums differ in the last bits alone."""
    net = conv_net()
    plan = plan_of(net, 3)
    one, other = (compensated(net, plan, batches)[1] for batches in ([IMAGES], IMAGES.split(10)))
    assert {name: report.columns for name, report in one.items()} == {n: r.columns for n, r in other.items()}
    for name in one:
        assert one[name].compensated == pytest.approx(other[name].compensated, rel=0.05)


@pytest.mark.parametrize("damping", [0, 0.1])
def test_damping_is_reported(damping: float) -> None:
    net = seeded(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    _, reports = compensated(net, plan_of(net), [ROWS], damping=damping)
    assert {report.damping for report in reports.values()} == {damping}


def test_the_mean_output_error_of_every_layer_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no norm follows: of the first layer and of those behind it, against the float net as it is."""
    monkeypatch.setattr("mpq_plugins.simulation.shifts.LONGEST", 1e9)  # every output is of usual length
    net = seeded(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 4))
    made, _ = compensated(net, plan_of(net), ROWS.split(70))
    for depth in (1, 3, 5):
        with torch.no_grad():
            means = [model[:depth](ROWS).mean(0) for model in (made, net)]  # type: ignore[index]
        torch.testing.assert_close(means[0], means[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [1, 3])
def test_norms_get_the_means_and_variances_that_come_to_them(parts: int) -> None:
    net = conv_net()
    made, _ = compensated(net, plan_of(net, 3), IMAGES.chunk(parts))
    for name in ("bn1", "bn2"):
        came: list[Tensor] = []
        for model in (net, made):
            norm = model.get_submodule(name)
            handle = norm.register_forward_pre_hook(lambda module, args, came=came: came.append(args[0].double()))
            with torch.no_grad():
                model(IMAGES)
            handle.remove()
        f, q = (value.movedim(1, 0).flatten(1) for value in came)
        own, corrected = (model.get_submodule(name) for model in (net, made))
        moved = corrected.running_mean - own.running_mean  # type: ignore[operator]
        torch.testing.assert_close(moved.double(), q.mean(1) - f.mean(1), rtol=1e-3, atol=1e-5)
        rho = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(f, q, strict=True)]).clamp(0.3, 1)
        expected = q.var(1, unbiased=False) / f.var(1, unbiased=False) / rho**0.5
        scaled = corrected.running_var / own.running_var  # type: ignore[operator, arg-type]
        torch.testing.assert_close(scaled.double(), expected, rtol=1e-3, atol=0)


class Residual(nn.Module):
    """As torchvision writes it, in place or not."""

    def __init__(self, channels: int, inplace: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu, self.inplace = nn.ReLU(inplace=inplace), inplace

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.inplace:
            out += x
        else:
            out = out + x
        result: Tensor = self.relu(out)
        return result


@pytest.mark.parametrize("inplace", [False, True])
def test_a_block_makes_good_what_its_shortcut_lost(inplace: bool) -> None:
    net = seeded(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), Residual(6, inplace), Residual(6, inplace))
    _, reports = compensated(net, plan_of(net, 3), [IMAGES])
    targets = {name: report.target for name, report in reports.items()}
    assert targets["2.conv2"] == targets["3.conv2"] == "the float sum"
    assert targets["2.conv1"] == targets["3.conv1"] == targets["0"] == "the float output"


def test_what_a_shortcut_lost_counts_by_the_gain_of_the_norm_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    net = seeded(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), Residual(6, inplace=False))
    norm: Any = net[2].bn2
    with torch.no_grad():
        norm.running_var.uniform_(0.2, 3)
        norm.weight.copy_(torch.tensor([2.0, -0.5, 0.0, 1e-6, -1e-6, 1.0]))
    lost: dict[str, list[Tensor]] = {}
    usual = LayerRounding.round

    def watched(self: LayerRounding, calls: Any, *rest: Any) -> Any:
        lost[self.name] = [call.lost for call in calls if call.lost is not None]
        return usual(self, calls, *rest)

    monkeypatch.setattr(LayerRounding, "round", watched)
    made, _ = compensated(net, plan_of(net, 3), IMAGES.chunk(2))
    assert {name: len(of_layer) for name, of_layer in lost.items()} == {"0": 0, "2.conv1": 0, "2.conv2": 2}
    with torch.no_grad():
        difference = net[:2](IMAGES) - made[:2](IMAGES)  # type: ignore[index]
    pairs = zip(norm.weight.tolist(), norm.running_var.tolist(), strict=True)
    gain = [weight / (variance + norm.eps) ** 0.5 for weight, variance in pairs]
    gain[2:5] = [1e-3, 1e-3, -1e-3]  # no smaller, or what was lost would be all that counts
    expected = difference / torch.tensor(gain).view(1, 6, 1, 1)
    torch.testing.assert_close(torch.cat(lost["2.conv2"]), expected, rtol=1e-3, atol=1e-4)


def test_working_in_place_changes_nothing() -> None:
    nets = [
        seeded(nn.Conv2d(3, 6, 3, padding=1), Residual(6, inplace), Residual(6, inplace)) for inplace in (False, True)
    ]
    made = [compensated(net, plan_of(net, 3), [IMAGES])[0] for net in nets]
    assert same(made[0], made[1])


# ---- models of other shapes


class Functional(nn.Module):
    """Uses a layer's weight without calling it; another one is never reached."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.fc(x)), self.used.weight)


def test_layers_that_are_never_called_are_rounded_to_nearest_and_said() -> None:
    torch.manual_seed(0)
    net = Functional().eval()
    plan = plan_of(net)
    made, reports = compensated(net, plan, [ROWS], nearest=("used", "idle"))
    assert reports["used"].why == reports["idle"].why != ""
    for name in ("used", "idle"):
        assert weight_of(made, name).equal(weight_of(net, name))
    assert made.state_dict().keys() == net.state_dict().keys()  # and no new bias


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_layers_that_compute_in_their_own_way_are_rounded_to_nearest_and_said() -> None:
    net = seeded(nn.Linear(8, 8), Scaled(8, 8), nn.Linear(8, 4))
    net[2].register_forward_hook(lambda module, args, output: output + 1)
    plan = plan_of(net)
    reports: list[LayerReport] = []
    with unchanged(net), pytest.warns(UserWarning) as said:  # noqa: PT030  # two of them
        mpq.compensate(net, plan, [ROWS], finished=reports.append)
    assert [report.name for report in reports] == ["0"]
    assert any(names(warning.message, "rounded to nearest", "'1'", "Scaled", "'2'", "hooks") for warning in said)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_to_nearest(dtype: torch.dtype) -> None:
    net = seeded(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype)
    plan = plan_of(net)
    made, reports = compensated(net, plan, [ROWS.to(dtype)], nearest=("0", "2"))
    assert reports == {}
    assert {parameter.dtype for parameter in made.parameters()} == {dtype}
    assert same(mpq.apply(made, plan), mpq.apply(made, plan))
    assert weight_of(made, "0").equal(weight_of(net, "0"))


def test_tied_weights_stay_tied_and_an_embeddings_is_rounded_to_nearest() -> None:
    net = tied_net()
    plan = plan_of(net, 3, Affine(granularity="per_channel"))
    tokens = [torch.randint(20, (16, 5), generator=torch.Generator().manual_seed(k)) for k in range(3)]
    made, reports = compensated(net, plan, tokens)  # and nothing is said of the embedding
    assert made.embed.weight is made.lm_head.weight  # type: ignore[union-attr]
    assert made.block is made.again
    assert set(reports) == {"block"}
    # Called twice: the inputs of the second call count too.
    assert reports["block"].columns > 3 * 16 * 5
    assert weight_of(made, "embed").equal(net.embed.weight)


class Twins(nn.Module):
    """Two layers with one weight and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.other(F.relu(self.one(x))))
        return result


def test_layers_that_share_a_weight_are_rounded_once_on_the_inputs_of_both() -> None:
    torch.manual_seed(0)
    net = Twins().eval()
    made, reports = compensated(net, plan_of(net), [ROWS])
    assert set(reports) == {"one", "head"}
    assert reports["one"].columns == 600
    assert made.one.weight is made.other.weight  # type: ignore[union-attr]
    assert made.one.bias is not made.other.bias  # type: ignore[union-attr]


class Experts(nn.Module):
    """Rows go to one of three experts; no row goes to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        expert = 0 if float(x.mean()) > 0.5 else 1
        result: Tensor = self.experts[expert](F.relu(self.stem(x)))
        return result


def test_experts_are_compensated_on_the_batches_that_reach_them() -> None:
    torch.manual_seed(0)
    net = Experts().eval()
    batches = [ROWS[:100] - 1, ROWS[100:250] + 1, ROWS[250:] + 1]
    _, reports = compensated(net, plan_of(net), batches, nearest=("experts.2",))
    assert {name: report.columns for name, report in reports.items()} == {
        "stem": 300, "experts.0": 200, "experts.1": 100, "experts.2": 0,
    }  # fmt: skip


class Encoder(nn.Module):
    """Transformer layers with a padding mask; called by keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden: Tensor = self.encoder(self.embed(tokens), src_key_padding_mask=mask)
        return hidden.mean(1)


def test_transformer_layers_of_uneven_batches_keep_their_own_weights_as_targets() -> None:
    torch.manual_seed(0)
    net = Encoder().eval()
    plan = plan_of(net, 3, Affine(granularity="per_channel"))
    generator, batches = torch.Generator().manual_seed(0), []
    for length in (4, 7, 5):
        mask = torch.zeros(30, length, dtype=torch.bool)
        mask[1, -1] = True
        batches.append({"tokens": torch.randint(30, (30, length), generator=generator), "mask": mask})
    functional = [f"encoder.layers.{k}.self_attn.out_proj" for k in range(2)]  # torch calls a function with its weight
    _, reports = compensated(net, plan, batches, nearest=functional)
    layers = [f"encoder.layers.{k}.linear{n}" for k in range(2) for n in (1, 2)]
    assert {reports[name].target for name in layers} == {"its own weights"}
    assert all(reports[name].columns > 0.8 * 30 * 16 for name in layers)


class Remembering(nn.Module):
    """Keeps a value on itself between two layers, and reads it after them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.kept = nn.Linear(8, 8), nn.Linear(8, 4), torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = F.relu(x)
        y: Tensor = self.one(x)
        return self.other(y + self.kept)  # type: ignore[no-any-return]


def test_a_model_that_keeps_values_on_itself_keeps_each_batchs_apart() -> None:
    torch.manual_seed(0)
    net = Remembering().eval()
    plan = plan_of(net)
    one, several = (compensated(net, plan, batches)[0] for batches in ([ROWS], ROWS.split(100)))
    assert weight_of(one, "other").equal(weight_of(several, "other"))
    torch.testing.assert_close(one.other.bias, several.other.bias)  # type: ignore[union-attr]


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        result: Tensor = self.fc(input=x) * scale
        return result


def test_batches_may_be_tensors_tuples_lists_and_mappings_and_come_from_a_generator() -> None:
    torch.manual_seed(0)
    net = Keywords().eval()
    plan = plan_of(net)
    every: list[Any] = [
        [ROWS], [(ROWS,)], [[ROWS, 1.0]], [{"x": ROWS}], [UserDict({"x": ROWS, "scale": 1.0})], (b for b in [ROWS])
    ]  # fmt: skip
    made = [mpq.compensate(net, plan, batches) for batches in every]
    assert all(same(made[0], other) for other in made[1:])


@pytest.mark.parametrize(
    "make",
    [
        lambda: seeded(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 2, groups=2)),
        lambda: seeded(nn.Conv2d(4, 8, 3, groups=4, padding="same"), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, stride=2)),
        lambda: seeded(nn.Conv3d(4, 4, 2), nn.ReLU(), nn.ConvTranspose3d(4, 2, 2, stride=2)),
        lambda: seeded(nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), nn.ReLU(), nn.Conv1d(6, 3, 3)),
        lambda: seeded(nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), nn.BatchNorm2d(6)),
        lambda: seeded(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), nn.Conv2d(6, 3, 1)),
    ],
    ids=["1d", "depthwise", "3d", "up 1d", "up 2d", "reflected"],
)
def test_convolutions_of_every_kind_are_compensated(make: Any) -> None:
    net = make()
    spatial = {"1": 1, "2": 2, "3": 3}[type(net[0]).__name__[-2]]
    given = torch.randn(40, 4, *[6] * spatial, generator=torch.Generator().manual_seed(0))
    plan = plan_of(net, 2, Affine(granularity="per_channel"))
    made, reports = compensated(net, plan, [given])
    assert len(reports) == len(plan.layers)
    check_integers(made, plan)
    assert error(made, net, given) < error(mpq.apply(net, plan), net, given)


def test_a_plan_measured_folded_gives_a_folded_copy() -> None:
    net = conv_net()
    plan = plan_of(net, 3, fold_bn=True)
    assert plan.fold_bn
    reports: list[LayerReport] = []
    with unchanged(net):
        made = mpq.compensate(net, plan, [IMAGES], finished=reports.append)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in made.modules())
    assert same(mpq.apply(made, plan), made)
    check_integers(made, plan)
    folded = fold_batch_norm(net)
    assert error(made, net, IMAGES) < error(mpq.apply(folded, plan), net, IMAGES)


@pytest.mark.parametrize("training", [False, True])
def test_modes_and_gradients_are_the_models(training: bool) -> None:
    net = conv_net().train(training)
    net.bn1.eval()
    net.conv1.weight.requires_grad_(False)
    made, _ = compensated(net, plan_of(conv_net()), [IMAGES])
    assert {n: m.training for n, m in made.named_modules()} == {n: m.training for n, m in net.named_modules()}
    assert {n: p.requires_grad for n, p in made.named_parameters()} | {"conv1.bias": True} == {
        n: p.requires_grad for n, p in net.named_parameters()
    } | {"conv1.bias": True}
    assert int(made.bn1.num_batches_tracked) == int(net.bn1.num_batches_tracked)  # type: ignore[union-attr,arg-type]


def test_no_hooks_stay_in_the_result_but_the_users() -> None:
    net = conv_net()
    calls: list[int] = []
    net.register_forward_hook(lambda module, args, output: calls.append(1))
    made, _ = compensated(net, plan_of(net), [IMAGES])
    for name, module in made.named_modules():
        assert len(module._forward_hooks) == (name == "")
        assert not module._forward_pre_hooks


def test_in_inference_mode_the_result_can_still_be_trained() -> None:
    net = conv_net()
    with torch.inference_mode():
        made = mpq.compensate(net, plan_of(net), [IMAGES])
    loss = made(IMAGES).square().mean()
    loss.backward()
    assert made.get_submodule("fc").weight.grad is not None


# ---- a store


def again(net: nn.Module, arguments: dict[str, Any]) -> nn.Module:
    return mpq.compensate(net, **arguments)


def interrupted_after(count: int, net: nn.Module, plan: mpq.Plan, place: Any, **options: Any) -> None:
    """Stop as Ctrl-C does, when so many layers are done."""
    done: list[str] = []

    def stop(name: str, steps: int, total: int) -> None:
        if len(done) >= count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mpq.compensate(net, plan, [IMAGES], store=place, progress=stop,
                       finished=lambda report: done.append(report.name), **options)  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("scheme", [CLIPPED, Piecewise(granularity="per_channel")], ids=str)
@pytest.mark.filterwarnings("ignore:rounded to nearest")
def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path: Path, scheme: Scheme, count: int) -> None:
    net, place = conv_net(), tmp_path / "out.partial"
    plan, options = plan_of(net, 3, scheme), dict[str, Any](columns=500)
    whole_reports: list[LayerReport] = []
    whole = mpq.compensate(net, plan, [IMAGES], finished=whole_reports.append, **options)
    interrupted_after(count, net, plan, place, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    reports: list[LayerReport] = []
    with unchanged(net):
        resumed = mpq.compensate(net, plan, [IMAGES], store=place, finished=reports.append, **options)
    assert same(resumed, whole)
    assert [report.resumed for report in reports] == [True] * count + [False] * (4 - count)
    for one, other in zip(reports, whole_reports, strict=True):
        assert (one.name, one.rounding, one.compensated, one.changed) == (
            other.name, other.rounding, other.compensated, other.changed,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_is_read_back_whole(tmp_path: Path) -> None:
    net, place, reports = conv_net(), tmp_path / "out.partial", list[LayerReport]()
    plan = plan_of(net)
    with suppress(KeyboardInterrupt), mpq.Store(place) as store:
        first = mpq.compensate(net, plan, [IMAGES], store=store)
        raise KeyboardInterrupt  # before it is saved
    again = mpq.compensate(net, plan, [IMAGES], store=place, finished=reports.append)
    assert same(first, again)
    assert all(report.resumed for report in reports)


def test_a_store_of_another_job_is_refused(tmp_path: Path) -> None:
    net, place = conv_net(), tmp_path / "out.partial"
    plan = plan_of(net)
    interrupted_after(2, net, plan, place)
    before = place.read_bytes()
    others = {"seed": 1, "columns": 7, "damping": 0.5, "batches": [IMAGES[:9]], "plan": plan_of(net, 3)}
    for name, value in others.items():
        fact, changed = name if name in ("batches", "plan") else "settings", {name: value}
        with pytest.raises(SettingError, match=rf"holds what another job finished \(it differs in {fact}\)"):
            again(net, {"plan": plan, "batches": [IMAGES], "store": place} | changed)
    assert place.read_bytes() == before


# ---- what is refused, and what is said


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["first", "later"])
@pytest.mark.filterwarnings("ignore:not corrected, for they compute")
def test_a_bad_batch_is_refused_by_the_layers_name(bad: float, where: str) -> None:
    net, given = conv_net(), IMAGES.clone()
    if where == "first":
        given[3, 1, 2, 2] = bad
        name = "conv1"
    else:
        net.bn1.register_forward_hook(lambda module, args, output: output + bad)
        name = "conv2"
    plan = plan_of(net)
    with unchanged(net), pytest.raises(SettingError, match=naming(name, "NaN")):
        mpq.compensate(net, plan, [IMAGES, given])


def test_inputs_that_are_all_zero_are_rounded_to_nearest_and_said() -> None:
    net = seeded(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    made, reports = compensated(net, plan_of(net), [torch.zeros(300, 8)], nearest=("0",))
    assert "zero" in reports["0"].why
    assert reports["2"].rounding == "compensated"
    assert weight_of(made, "0").equal(weight_of(net, "0"))


def test_a_layer_that_is_better_rounded_to_nearest_is_and_the_report_says_so() -> None:
    net = conv_net()
    made, reports = compensated(net, plan_of(net), [IMAGES], better=("fc",), damping=0)  # 48 rows for 6 inputs
    assert reports["fc"].why == "rounding to nearest is better"
    assert weight_of(made, "fc").equal(weight_of(net, "fc"))


def test_few_inputs_are_said() -> None:
    net = seeded(nn.Linear(64, 8))
    with pytest.warns(UserWarning, match=naming("few inputs", "'0'", "5 for 64 inputs", "more batches")) as said:
        mpq.compensate(net, plan_of(net), [torch.randn(5, 64, generator=torch.Generator().manual_seed(0))])
    assert said[0].filename == __file__


def test_dead_and_constant_channels_do_no_harm() -> None:
    net = conv_net()
    with torch.no_grad():
        net.conv1.weight[2] = 0
        net.conv2.weight[4] = 0.25
        net.conv2.weight[:, 1] = 0
        net.bn1.weight[2] = 0
    plan = plan_of(net, 2, Affine(granularity="per_channel"))
    made, _ = compensated(net, plan, [IMAGES])
    assert (weight_of(made, "conv1")[2] == 0).all()
    torch.testing.assert_close(weight_of(made, "conv2")[4, 0], torch.full((3, 3), 0.25))
    assert made(IMAGES).isfinite().all()


def test_a_pruned_layer_stays_pruned() -> None:
    net = conv_net()
    with torch.no_grad():
        mask = torch.rand(net.conv2.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.6
        net.conv2.weight[mask] = 0
    for scheme in (CLIPPED, Affine(symmetric=True), Codebook()):
        made, _ = compensated(net, plan_of(net, 3, scheme), [IMAGES])
        assert (weight_of(made, "conv2")[mask] == 0).all() or not scheme.has_zero(3)


def test_a_layer_of_no_weights_is_no_trouble() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)).eval()
    net[1].weight, net[1].bias = nn.Parameter(torch.zeros(0, 8)), nn.Parameter(torch.zeros(0))
    plan = plan_of(net)
    made = mpq.compensate(net, plan, [ROWS])
    assert weight_of(made, "1").shape == (0, 8)


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"columns": 0}, ("columns", "0")), ({"columns": 1.5}, ("columns", "1.5")),
        ({"columns": True}, ("columns", "True")),
        ({"damping": -0.1}, ("damping", "-0.1")), ({"damping": float("nan")}, ("damping", "nan")),
        ({"damping": "a"}, ("damping", "'a'")), ({"seed": -1}, ("seed", "-1")), ({"seed": 0.5}, ("seed", "0.5")),
        ({"batches": []}, ("batches", "none")), ({"batches": IMAGES}, ("batches", "single tensor")),
        ({"batches": {"x": IMAGES}}, ("batches",)), ({"batches": 3}, ("batches", "int")),
        ({"batches": [IMAGES[:, :2]]}, ("batches", "does not run")),
        ({"batches": [IMAGES, "text"]}, ("batches", "str")),
        ({"batches": [(IMAGES, torch.zeros(48))]}, ("batches", "does not run")), ({"device": "nowhere"}, ("nowhere",)),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments_are_refused_by_name(options: dict[str, Any], facts: tuple[str, ...]) -> None:
    net = conv_net()
    plan = plan_of(net)
    with unchanged(net), pytest.raises(SettingError, match=naming(*facts)):
        again(net, {"plan": plan, "batches": [IMAGES]} | options)


def test_another_models_plan_and_bad_weights_are_refused() -> None:
    net = conv_net()
    with pytest.raises(MismatchError):
        mpq.compensate(net, plan_of(seeded(nn.Linear(8, 8))), [IMAGES])
    plan = plan_of(net)
    with torch.no_grad():
        net.conv2.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises((WeightError, MismatchError, SettingError), match="conv2"):
        mpq.compensate(net, plan, [IMAGES])


def test_progress_counts_up_to_the_end() -> None:
    said: list[tuple[str, int, int]] = []
    net = conv_net()
    compensated(net, plan_of(net), [IMAGES], progress=lambda *words: said.append(words))
    assert [done for _, done, _ in said] == list(range(len(said)))
    assert {total for *_, total in said} == {len(said) - 1}
    assert said[0][0] == "conv1"
    assert said[-1][0] == ""
    assert {"conv1", "bn1", "conv2", "bn2", "up", "fc"} <= {name for name, *_ in said}


@pytest.mark.filterwarnings("ignore:few inputs:mpq_plugins.RoundingWarning")
def test_no_layer_gets_a_bias_where_there_is_no_place_for_one() -> None:
    net = seeded(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
    plan = mpq.Uniform(bits=2)(mpq.measure(net, Affine(granularity="per_channel")))
    batches = [torch.randn(64, 8, generator=torch.Generator().manual_seed(3))]
    usual = mpq.compensate(net, plan, batches)
    assert {"0.bias", "2.bias", "4.bias"} <= usual.state_dict().keys()
    made = mpq.compensate(net, plan, batches, new_biases=False)
    assert made.state_dict().keys() == net.state_dict().keys()
    assert not torch.equal(made.get_parameter("2.bias"), net.get_parameter("2.bias"))  # which it had, is corrected
    assert not torch.equal(made.get_parameter("0.weight"), mpq.apply(net, plan).get_parameter("0.weight"))
    assert torch.equal(mpq.apply(made, plan).get_parameter("0.weight"), made.get_parameter("0.weight"))
    with pytest.raises(SettingError, match="new_biases: 1 is not allowed; True or False"):
        mpq.compensate(net, plan, batches, new_biases=1)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:few inputs:mpq_plugins.RoundingWarning")
def test_tokens_of_long_outputs_are_left_out_or_count_as_much_as_others() -> None:
    """The error on the long token is what tells them apart."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16, bias=False)).eval()
    plan = mpq.Uniform(bits=2)(mpq.measure(net, Affine(granularity="per_channel")))
    tokens = torch.randn(8, 40, 16)
    long = torch.randn(16) * 100
    tokens[:, 0] = long  # the first of each text

    def lost(made: nn.Module, inputs: Tensor) -> float:
        return float((mpq.apply(made, plan)(inputs) - net(inputs)).square().sum().detach())

    left_out = mpq.compensate(net, plan, [tokens], new_biases=False)
    shortened = mpq.compensate(net, plan, [tokens], new_biases=False, outliers="shorten")
    assert lost(shortened, long) < lost(left_out, long) / 2
    assert lost(left_out, tokens[:, 1:]) < lost(shortened, tokens[:, 1:])
    with pytest.raises(SettingError, match="outliers: 'cut' is not allowed; leave_out, shorten"):
        mpq.compensate(net, plan, [tokens], outliers="cut")  # type: ignore[arg-type]
