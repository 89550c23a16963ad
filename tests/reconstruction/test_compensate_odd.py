"""Models that are written in odd ways: what compensation makes of them is never worse than rounding to nearest."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpq_plugins as mpq
from mpq_plugins.errors import SettingError

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEME = mpq.Affine(granularity="per_channel", range="mse")
ROWS = torch.randn(256, 16, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def error(net: nn.Module, made: nn.Module, batches: Sequence[Any]) -> float:
    with torch.no_grad():
        return float(torch.cat([(net(batch) - made(batch)).flatten() for batch in batches]).square().mean())


def made_of(
    net: nn.Module, batches: Sequence[Any], bits: int = 4
) -> tuple[nn.Module, nn.Module, list[mpq.LayerReport]]:
    """Compensated; rounded to nearest and corrected; what was reported."""
    plan = mpq.Uniform(bits=bits)(mpq.measure(net, SCHEME, (bits,)))
    reports: list[mpq.LayerReport] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = mpq.apply(mpq.compensate(net, plan, batches, finished=reports.append), plan)
        return made, mpq.apply(net, plan, calibrate=batches, rounding="nearest"), reports


class Net(nn.Module):
    """Layers by name, and a forward that is told."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, layer in layers.items():
            layer.reset_parameters()  # type: ignore[operator]
            setattr(self, name, layer)
        self.told = forward
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.told(self, x)


def test_modules_on_one_weight_with_biases_of_their_own() -> None:
    net: Any = Net(lambda net, x: net.a(net.b(x) * 0.1), a=nn.Linear(16, 16), b=nn.Linear(16, 16))
    net.b.weight = net.a.weight
    nn.init.constant_(net.b.bias, 3.0)
    made, corrected, reports = made_of(net, ROWS.split(64))
    assert {report.target for report in reports} == {"its own weights"}
    assert error(net, made, [ROWS]) < 2 * error(net, corrected, [ROWS])


def test_convolutions_on_one_weight_with_shapes_of_their_own() -> None:
    first, second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=2, dilation=2)
    net: Any = Net(lambda net, x: net.a(torch.relu(net.b(x))), a=first, b=second)
    net.b.weight = net.a.weight
    made, corrected, _ = made_of(net, IMAGES.split(16))
    assert error(net, made, [IMAGES]) < 2 * error(net, corrected, [IMAGES])


def test_a_module_of_another_kind_with_the_same_weight() -> None:
    class Decoder(nn.Module):
        def __init__(self, weight: Any) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x @ self.weight
            return out

    encoder = nn.Linear(16, 8)
    net = nn.Sequential(encoder, Decoder(encoder.weight)).eval()
    plan = mpq.Uniform(bits=4)(mpq.measure(net, SCHEME, (4,)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = mpq.apply(mpq.compensate(net, plan, [ROWS]), plan)
    mpq.verify(made, plan)


@pytest.mark.parametrize("told", [
    lambda net, x: net.b(net.a(x)[net.a(x)[:, 0].argsort()]),
    lambda net, x: net.b(F.dropout(net.a(x), 0.5, True)),
], ids=["sorted rows", "random"])  # fmt: skip
def test_rows_of_other_samples_are_not_fitted_to_each_other(told: Callable[[Any, Tensor], Tensor]) -> None:
    a, b = nn.Linear(16, 16), nn.Linear(16, 16)
    made, _, _ = made_of(Net(told, a=a, b=b), ROWS.split(64))
    own = b.weight.detach()
    moved = (made.state_dict()["b.weight"] - own).norm() / own.norm()
    assert moved < 0.25  # to nearest 0.06; fitted 0.5 to 1


def test_a_layer_that_is_used_without_a_call_is_rounded_before_what_comes_behind() -> None:
    net = Net(lambda net, x: net.b(F.linear(x, net.a.weight, net.a.bias)), a=nn.Linear(16, 16), b=nn.Linear(16, 16))
    made, _, reports = made_of(net, ROWS.split(64), 2)
    assert {report.name: report.rounding for report in reports} == {"a": "nearest", "b": "compensated"}
    with torch.no_grad():
        lost = (net(ROWS) - made(ROWS)).mean(0).abs().max()
    assert lost < 1e-4  # the bias behind makes good what `a` loses


def test_one_activation_that_serves_the_whole_net() -> None:
    def told(net: Any, x: Tensor) -> Tensor:
        x = torch.relu(net.stem(x))
        for one, other in ((net.c1, net.c2), (net.c3, net.c4)):
            x = torch.relu(other(torch.relu(one(x))) + x)
        return x

    convolutions = {name: nn.Conv2d(6, 6, 3, padding=1) for name in ("c1", "c2", "c3", "c4")}
    net = Net(told, stem=nn.Conv2d(3, 6, 3, padding=1), **convolutions)
    made, corrected, _ = made_of(net, IMAGES.split(16), 3)
    assert error(net, made, [IMAGES]) < error(net, corrected, [IMAGES])


@pytest.mark.parametrize(("batches", "told"), [
    ([ROWS, ROWS], lambda net, x: net.b(net.a(x).view(256, 4, 4).flatten(1))),
    ([IMAGES[0].reshape(12, 16)] * 4, lambda net, x: net.b(net.a(x).view(12, 16))),
    ([*ROWS[:40]], lambda net, x: net.b(net.a(x))),
    ([ROWS.view(16, 16, 16), ROWS], lambda net, x: net.b(net.a(x))),
], ids=["one size of batch", "another", "single samples", "of two and three axes"])  # fmt: skip
def test_batches_of_any_kind(batches: list[Tensor], told: Callable[[Any, Tensor], Tensor]) -> None:
    made, _, reports = made_of(Net(told, a=nn.Linear(16, 16), b=nn.Linear(16, 16)), batches)
    assert {report.rounding for report in reports} == {"compensated"}
    assert isinstance(made, nn.Module)


def test_a_forward_in_inference_mode() -> None:
    @torch.inference_mode()
    def told(net: Any, x: Tensor) -> Tensor:
        out: Tensor = net.b(net.a(x)) + x
        return out

    _, _, reports = made_of(Net(told, a=nn.Linear(16, 16), b=nn.Linear(16, 16)), ROWS.split(128))
    assert [report.rounding for report in reports] == ["compensated", "compensated"]


def test_a_forward_that_computes_in_half_precision() -> None:
    def told(net: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = net.b(net.a(x))
        return out.float()

    made, corrected, _ = made_of(net := Net(told, a=nn.Linear(16, 16), b=nn.Linear(16, 16)), ROWS.split(128), 2)
    assert error(net, made, [ROWS]) < error(net, corrected, [ROWS])


def test_another_default_dtype() -> None:
    net = Net(lambda net, x: net.b(net.a(x)), a=nn.Linear(16, 16), b=nn.Linear(16, 16))
    plan = mpq.Uniform(bits=3)(mpq.measure(net, SCHEME, (3,)))
    expected = mpq.compensate(net, plan, [ROWS])
    torch.set_default_dtype(torch.float64)
    try:
        made = mpq.compensate(net, plan, [ROWS])
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.equal(b) for a, b in zip(made.state_dict().values(), expected.state_dict().values(), strict=True))


def test_what_cannot_be_run_side_by_side_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(16, 16)).eval()
    plan = mpq.Uniform(bits=3)(mpq.measure(net, SCHEME, (3,)))
    monkeypatch.setattr("mpq_plugins.reconstruction.compensate.MOST_THREADS", 7)
    with pytest.raises(SettingError, match="larger batches"):
        mpq.compensate(net, plan, [*ROWS.split(64)])
    for options in ({"progress": 3}, {"finished": "x"}, {"damping": 11}):
        with pytest.raises(SettingError):
            mpq.compensate(net, plan, [ROWS], **options)


def test_what_a_shortcut_brought_is_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpq_plugins.reconstruction import walk

    most = []
    forget = walk.Walk._forget

    def watched(self: Any, at: Any, pairs: Any) -> None:
        forget(self, at, pairs)
        most.append(max(len(stream.notes) for pair in pairs for stream in pair))

    monkeypatch.setattr(walk.Walk, "_forget", watched)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv(x) + x
            return out

    torch.manual_seed(0)
    net = nn.Sequential(*(Block() for _ in range(6))).eval()
    _, _, reports = made_of(net, [IMAGES], 3)
    assert {report.target for report in reports} == {"the float sum"}
    assert max(most) <= 2


@pytest.mark.filterwarnings("ignore:rounded to nearest", "ignore:not corrected")
def test_a_layer_that_nothing_calls_is_reported_once_when_a_run_goes_on(tmp_path: Path) -> None:
    net = Net(lambda net, x: net.b(F.linear(x, net.a.weight, net.a.bias)), a=nn.Linear(16, 16), b=nn.Linear(16, 16))
    plan = mpq.Uniform(bits=2)(mpq.measure(net, SCHEME, (2,)))

    def stopped(name: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    reports: list[mpq.LayerReport] = []
    with pytest.raises(KeyboardInterrupt):
        mpq.compensate(net, plan, [ROWS], store=tmp_path / "kept", progress=stopped)
    mpq.compensate(net, plan, [ROWS], store=tmp_path / "kept", finished=reports.append)
    assert [(report.name, report.resumed) for report in reports] == [("a", True), ("b", False)]
