"""Which BatchNorm takes a layer's output and what is added to it, in blocks as they are written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq_plugins.errors import SettingError
from mpq_plugins.models.tracing import BATCH_NORMS
from mpq_plugins.reconstruction.stations import Stations, Sum, find_stations
from tests.helpers.says import naming

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Two convolutions with norms; `add` says how the shortcut comes in."""

    def __init__(self, add: Callable[["Block", Tensor, Tensor], Tensor], *, inplace: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.act1 = nn.ReLU(inplace=inplace)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.act2 = nn.ReLU(inplace=inplace)
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        result: Tensor = self.act2(self.add(self, out, x))
        return result


def found(net: nn.Module, given: Any = IMAGES) -> Stations:
    names = [n for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear, *BATCH_NORMS))]
    return find_stations(net.eval(), names, given)


def iadd(block: Block, out: Tensor, x: Tensor) -> Tensor:
    out += x
    return out


ADDS: dict[str, Callable[[Block, Tensor, Tensor], Tensor]] = {
    "out + x": lambda block, out, x: out + x,
    "x + out": lambda block, out, x: x + out,
    "out += x": iadd,
    "torch.add": lambda block, out, x: torch.add(out, x),
    "add_": lambda block, out, x: out.add_(x),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("add", ADDS.values(), ids=ADDS)
def test_a_blocks_input_is_added_behind_the_last_norm(add: Any, inplace: bool) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1), Block(add, inplace=inplace))
    stations = found(net)
    assert stations.order == ("0", "1.conv1", "1.bn1", "1.conv2", "1.bn2")
    assert stations.norms == {"1.conv1": "1.bn1", "1.conv2": "1.bn2"}
    # The same tensor is the stem's output.
    assert stations.sums == {"1.conv2": Sum("0", False, "1.bn2")}
    assert dict(stations.calls) == dict.fromkeys(stations.order, 1)


def test_the_models_input_is_one_that_can_be_added() -> None:
    assert found(Block(ADDS["out + x"])).sums == {"conv2": Sum("", True, "bn2")}


def test_a_shortcut_by_a_convolution_that_runs_last_belongs_to_it() -> None:
    """torchvision's BasicBlock: what has run before the layer is added to it, so the last to run makes it good."""
    stations = found(Block(lambda block, out, x: out + block.downsample(x)))
    assert stations.norms["downsample.0"] == "downsample.1"
    assert stations.sums == {"downsample.0": Sum("bn2", False, "downsample.1")}


def test_a_shortcut_by_a_convolution_that_runs_first_is_added_to_the_branch() -> None:
    class First(Block):
        def forward(self, x: Tensor) -> Tensor:
            shortcut = self.downsample(x)
            return self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))) + shortcut  # type: ignore[no-any-return]

    stations = found(First(ADDS["out + x"]))
    assert set(stations.sums) == {"conv2"}
    assert stations.sums["conv2"].norm == "bn2"
    assert stations.sums["conv2"].module in ("downsample", "downsample.1")  # one tensor by two names
    assert not stations.sums["conv2"].is_input


class PreActivation(nn.Module):
    """Norm and activation first, no norm behind the last convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(out))) + x  # type: ignore[no-any-return]


def test_pre_activation_blocks_add_without_a_norm_in_between() -> None:
    stations = found(nn.Sequential(nn.Conv2d(4, 4, 1), PreActivation(), PreActivation()))
    assert stations.sums["1.conv2"] == Sum("0", False, None)
    assert stations.sums["2.conv2"].norm is None
    assert stations.sums["2.conv2"].module in ("1", "2")
    assert stations.norms["1.conv1"] == "1.bn2"
    assert "1.conv2" not in stations.norms  # a sum is what the next block's norm takes


def test_without_norms_sums_are_found_all_the_same() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(F.relu(self.fc1(x))) + x  # type: ignore[no-any-return]

    assert found(Plain(), torch.randn(3, 5)).sums == {"fc2": Sum("", True, None)}


def test_a_layers_own_input_may_be_what_is_added_though_no_module_gave_it() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(x)
            return self.conv(x) + x  # type: ignore[no-any-return]

    assert found(Single()).sums == {"conv": Sum("conv", True, None)}


class Odd(nn.Module):
    """A layer, a norm, and something in between or beside that is to mean that they do not belong together."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.bn, self.how = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), how
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        if self.how == "relu between":
            return self.bn(F.relu(out))  # type: ignore[no-any-return]
        if self.how == "in-place relu between":
            return self.bn(F.relu_(out))  # type: ignore[no-any-return]
        if self.how == "in-place module between":
            return self.bn(self.act(out))  # type: ignore[no-any-return]
        if self.how == "slice":
            return self.bn(out)[:, :, :3] + x[:, :, :3]  # type: ignore[no-any-return]
        if self.how == "broadcast":
            return self.bn(out) + x[:1]  # type: ignore[no-any-return]
        if self.how == "in-place on the input":
            x.mul_(2)
            return self.bn(out) + x  # type: ignore[no-any-return]
        if self.how == "scaled":
            return torch.add(self.bn(out), x, alpha=0.5)
        assert self.how == "number"
        return self.bn(out) + 1  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["relu between", "in-place relu between", "in-place module between"])
def test_a_norm_behind_something_else_takes_no_layers_output(how: str) -> None:
    assert found(Odd(how)).norms == {}


@pytest.mark.parametrize("how", ["slice", "broadcast", "in-place on the input", "scaled", "number"])
def test_what_is_no_plain_sum_with_a_value_that_went_by_is_none(how: str) -> None:
    stations = found(Odd(how))
    assert stations.sums == {}
    assert stations.norms == {"conv": "bn"}


@pytest.mark.parametrize("activation", [F.relu_, nn.ReLU(inplace=True)], ids=["function", "module"])
def test_an_output_that_was_changed_in_place_is_no_longer_the_layers(activation: Any) -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(4, 4, 1), activation

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.conv(x)) + x  # type: ignore[no-any-return]

    assert found(Changed()).sums == {}


def test_blocks_that_work_in_place_add_what_the_last_change_left() -> None:
    """As torchvision writes them: a block's input is a norm's output, added to and activated in place."""
    net = nn.Sequential(nn.Conv2d(4, 4, 1), *(Block(iadd, inplace=True) for _ in range(2)))
    assert found(net).sums["2.conv2"] == Sum("1.act2", False, "2.bn2")


def test_calls_are_counted_and_the_first_one_makes_the_order() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.a, self.unused = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.b(self.a(x))))  # type: ignore[no-any-return]

    stations = found(Twice(), torch.randn(3, 5))
    assert stations.order == ("a", "b")
    assert dict(stations.calls) == {"a": 2, "b": 2}


def test_watching_leaves_no_hooks_and_no_mode() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1), Block(ADDS["out += x"]))
    with pytest.raises(SettingError, match=naming("batches", "does not run")):
        found(net, torch.randn(2, 3, 6, 6))
    before = IMAGES.clone()
    found(net)
    assert IMAGES.equal(before)
    for module in net.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
