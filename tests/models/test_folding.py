import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from mpq_plugins import Affine, MixQuant, apply, measure, verify
from mpq_plugins.errors import SourceError
from mpq_plugins.models.folding import conv_bn_pairs, fold_batch_norm
from tests.helpers.nets import conv_net


def test_folding_keeps_the_function_and_the_names() -> None:
    net, images = conv_net(), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    folded = fold_batch_norm(net)
    assert isinstance(folded.bn1, nn.Identity)
    assert isinstance(net.bn1, nn.BatchNorm2d)
    torch.testing.assert_close(folded(images), net(images), rtol=1e-4, atol=1e-5)


def test_a_transposed_convolution_folds_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6)).eval()
    net[1].running_var.uniform_(0.5, 2)  # type: ignore[operator]
    images = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(fold_batch_norm(net)(images), net(images), rtol=1e-4, atol=1e-5)


class TwoReaders(nn.Module):
    """The convolution's output goes to two BatchNorms; folding either would change the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.left, self.right = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        result: Tensor = self.left(y) + self.right(y)
        return result


class Twice(nn.Module):
    """One convolution called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(self.conv(x)))
        return y


class Branching(nn.Module):
    """A forward that torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x)) if x.sum() > 0 else self.conv(x)
        return y


class TwoNames(nn.Module):
    """A BatchNorm registered twice; folding must empty both places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.layers = nn.ModuleList([self.conv, self.norm])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class OwnConv(nn.Conv2d):
    """A user's subclass, which torch.fx alone would look into."""


class SharedWeight(nn.Module):
    """Two convolutions share a weight; each BatchNorm would fold into it differently."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.b.weight = self.a.weight
        self.na, self.nb = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.nb(self.b(self.na(self.a(x))))
        return y


@pytest.mark.parametrize("net", [TwoNames(), nn.Sequential(OwnConv(3, 4, 3), nn.BatchNorm2d(4))])
def test_names_and_subclasses_do_not_hide_what_is_to_be_folded(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
            module.running_var.fill_(4.0)
    images = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    folded = fold_batch_norm(net.eval())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(images), net(images), rtol=1e-4, atol=1e-5)


def test_two_threads_may_measure_at_once() -> None:
    net, call = conv_net(), nn.Module.__call__
    with ThreadPoolExecutor(2) as pool:
        prints = list(pool.map(lambda _: measure(net, bits=(4,)).fingerprint, range(12)))
    assert len(set(prints)) == 1
    assert nn.Module.__call__ is call


def test_a_model_runs_in_another_thread_while_one_is_traced() -> None:
    running, inputs = conv_net(), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        expected = running(inputs)
    traced, stop, runs = conv_net(), threading.Event(), [0]

    def run() -> None:
        while not stop.is_set():
            with torch.no_grad():
                assert running(inputs).equal(expected)
            assert type(running.fc.weight) is nn.Parameter
            runs[0] += 1

    with ThreadPoolExecutor(1) as pool:
        ran = pool.submit(run)
        pairs: list[dict[str, str]] = []
        while len(pairs) < 60 or (runs[0] < 2 and not ran.done()):  # its first run may take longer than all of ours
            pairs.append(conv_bn_pairs(traced))
        stop.set()
        ran.result()
    assert runs[0] > 1
    assert all(pair == {"conv1": "bn1", "conv2": "bn2"} for pair in pairs)


class Adapting(nn.Module):
    """Has its norm normalise by the batch for as long as it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        self.norm.train()
        y: Tensor = self.norm(self.conv(x))
        self.norm.eval()
        return y


NOT_FOLDED = [SharedWeight(), TwoReaders(), Twice(), Adapting(), nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))]


@pytest.mark.parametrize("net", [net.eval() for net in NOT_FOLDED], ids=lambda net: type(net).__name__)
def test_what_folding_would_corrupt_stays_unfolded(net: nn.Module) -> None:
    assert conv_bn_pairs(net) == {}


def test_a_model_that_cannot_be_traced_is_refused_with_the_remedy() -> None:
    with pytest.raises(SourceError, match="fold_bn=False"):
        measure(Branching())
    assert len(measure(Branching(), fold_bn=False).layers) == 1
    assert len(measure(Branching(), Affine(granularity="per_channel")).layers) == 1


def test_auto_folds_per_tensor_and_not_per_channel() -> None:
    assert measure(conv_net()).fold_bn is True
    assert measure(conv_net(), Affine(granularity="per_channel")).fold_bn is False
    assert measure(nn.Linear(3, 3)).fold_bn is False


def test_a_folded_plan_is_measured_and_applied_on_folded_weights() -> None:
    net = conv_net()
    folded = fold_batch_norm(net)
    table, on_folded = measure(net), measure(folded)
    for ours, expected in zip(table.layers, on_folded.layers, strict=True):
        assert ours.errors["mse"].tolist() == expected.errors["mse"].tolist()
    plan = MixQuant(qem=3)(table)
    assert plan.fold_bn
    quantized = apply(net, plan)
    assert isinstance(quantized.bn1, nn.Identity)
    verify(quantized, plan, original=net)


def test_per_channel_codes_survive_folding() -> None:
    from mpq_plugins.quantization.affine import quantize

    net = conv_net()
    scheme = Affine(granularity="per_channel", symmetric=True)
    folded = fold_batch_norm(net).get_submodule("conv1").weight
    assert isinstance(folded, Tensor)
    plain, after = quantize(net.conv1.weight, 4, scheme), quantize(folded, 4, scheme)
    signs = net.bn1.weight.sign().reshape(-1, 1, 1, 1)
    assert (after.codes == plain.codes * signs).float().mean() > 0.999  # float32 rounding may move a tie
