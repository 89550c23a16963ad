"""Which modules are reconstructed together: on nets of the usual shapes, and by a user's patterns."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mpq_plugins as mpq
from mpq_plugins import Affine, SettingError
from mpq_plugins.reconstruction.blocks import default_blocks, find_units, in_call_order, learned_layers
from tests.helpers.nets import tied_net
from tests.helpers.plans import with_layer

PER_CHANNEL = Affine(granularity="per_channel")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)


class Mixer(nn.Module):
    """Two siblings of one class inside, and a layer beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.channels = Mlp(), Mlp()
        self.gate = nn.Linear(4, 4)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.layer1 = nn.Sequential(Residual(), Residual())
        self.layer2 = nn.Sequential(Residual())
        self.head = nn.Linear(4, 2)


class Siblings(nn.Module):
    """Blocks as attributes, as in torchvision's older nets, and one of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inception1, self.inception2 = Mixer(), Mixer()
        self.alone = Residual()
        self.head = nn.Linear(4, 2)


class Pair(nn.Module):
    """Two blocks in a list, itself in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Residual(), Residual()])
        self.merge = nn.Linear(4, 4)


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Pair(), Pair()])
        self.by_name = nn.ModuleDict({"left": Mlp(), "right": Mlp()})


def layers_of(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Linear(8, 2))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


@pytest.mark.parametrize(
    ("make", "blocks"),
    [
        (ResNet, ["layer1.0", "layer1.1", "layer2.0"]),
        (transformer, ["1.layers.0", "1.layers.1", "1.layers.2"]),
        (
            Stages,
            ["stages.0.inner.0", "stages.0.inner.1", "stages.1.inner.0", "stages.1.inner.1", "by_name.left",
             "by_name.right"],
        ),
        (Siblings, ["inception1", "inception2"]),
        (lambda: nn.Sequential(Mixer(), Mixer()), ["0", "1"]),
        (lambda: nn.Sequential(Mlp()), ["0"]),
        (plain, []),
        (lambda: nn.Linear(4, 4), []),
    ],
    ids=["resnet", "transformer", "nested", "siblings", "mixer", "one", "plain", "layer"],
)  # fmt: skip
def test_default_blocks(make: Callable[[], nn.Module], blocks: list[str]) -> None:
    net = make()
    assert list(default_blocks(net, layers_of(net))) == blocks


def test_a_listed_module_with_one_layer_is_no_block() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), Mlp())
    assert default_blocks(net, layers_of(net)) == ("1",)
    assert default_blocks(net, ["0.0", "1.fc1"]) == ()


@pytest.mark.parametrize("make", [ResNet, transformer, Stages, Siblings, plain, Mixer])
def test_every_layer_is_in_exactly_one_unit(make: Callable[[], nn.Module]) -> None:
    net = make()
    units = find_units(net, layers_of(net), ())
    assert sorted(layer for own in units.values() for layer in own) == sorted(layers_of(net))
    for name, own in units.items():
        assert own == (name,) or all(layer.startswith(f"{name}.") for layer in own)
    assert list(units) == [name for name, _ in net.named_modules() if name in units]


def test_layers_in_no_block_are_units_alone() -> None:
    net = Siblings()
    assert find_units(net, layers_of(net), ()) == {
        "inception1": tuple(name for name in layers_of(net) if name.startswith("inception1.")),
        "inception2": tuple(name for name in layers_of(net) if name.startswith("inception2.")),
        "alone.conv1": ("alone.conv1",),
        "alone.conv2": ("alone.conv2",),
        "head": ("head",),
    }
    assert find_units(plain(), layers_of(plain()), ()) == {"0": ("0",), "2.0": ("2.0",), "2.1": ("2.1",)}


@pytest.mark.parametrize(
    ("patterns", "blocks"),
    [
        (["layer1"], {"layer1"}),
        (["layer?"], {"layer1", "layer2"}),
        (["layer*"], {"layer1", "layer2"}),
        (["*.1", "layer1"], {"layer1"}),
        (["*.0"], {"layer1.0", "layer2.0"}),
        (["re:layer[12]"], {"layer1", "layer2"}),
        ([r"re:.*\.conv1"], set()),
        (["stem", "layer2.0.conv1"], set()),
        (["*"], {"layer1", "layer2"}),
    ],
)
def test_the_outermost_modules_that_match_are_blocks(patterns: list[str], blocks: set[str]) -> None:
    net = ResNet()
    units = find_units(net, layers_of(net), patterns)
    assert {name for name, own in units.items() if own != (name,)} == blocks
    assert sorted(layer for own in units.values() for layer in own) == sorted(layers_of(net))


def test_a_name_that_begins_alike_is_not_inside() -> None:
    net = nn.ModuleDict({"layer1": Residual(), "layer10": Residual()})
    units = find_units(net, layers_of(net), ["layer1"])
    assert units["layer1"] == ("layer1.conv1", "layer1.conv2")
    assert "layer10.conv1" in units


def test_patterns_that_match_nothing_are_named_with_candidates() -> None:
    net = ResNet()
    with pytest.raises(SettingError, match=re.escape("blocks: 'layer3', 'x*' match no module")) as said:
        find_units(net, layers_of(net), ["layer1", "layer3", "x*"])
    assert "'stem', 'layer1', 'layer1.0'" in str(said.value)
    with pytest.raises(SettingError, match="'layer1' match no module"):  # nothing to learn in there
        find_units(net, ["stem", "head"], ["layer1"])
    with pytest.raises(SettingError, match=r"^'re:\(': no regular expression"):
        find_units(net, layers_of(net), ["re:("])


def plan_of(net: nn.Module, bits: int = 3) -> mpq.Plan:
    return mpq.Uniform(bits=bits)(mpq.measure(net, PER_CHANNEL, (bits,)))


def test_weights_shared_with_an_embedding_are_left_out() -> None:
    net = tied_net()
    plan = plan_of(net)
    assert list(plan.by_any_name) == ["embed", "lm_head", "block", "again"]
    assert list(learned_layers(net, plan)) == ["block"]


class Shared(nn.Module):
    """One weight in two layers, and another layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.inside = nn.Sequential(nn.Linear(4, 4))
        self.outside = self.inside[0]


def test_each_weight_is_learned_once_where_it_is_first_used() -> None:
    net = Shared()
    learned = learned_layers(net, plan_of(net))
    assert {name: id(module) for name, module in learned.items()} == {
        "first": id(net.first),
        "inside.0": id(net.inside[0]),
    }


def test_layers_in_float_and_those_that_the_plan_skips_are_left_out() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    plan = mpq.Uniform(bits=3)(mpq.measure(net, PER_CHANNEL, (3,), skip=["2"]))
    assert list(learned_layers(net, plan)) == ["0", "1"]
    assert list(learned_layers(net, with_layer(plan, "0", bits=16))) == ["1"]
    parts = ({"bits": 16, "channels": (0, 1)}, {"bits": 2, "channels": (2, 3)})
    assert list(learned_layers(net, with_layer(plan, "0", bits=None, parts=parts))) == ["0", "1"]


def test_units_come_in_the_order_of_their_first_calls() -> None:
    units = {"a": ("a",), "b": ("b.0", "b.1"), "c": ("c",)}
    assert list(in_call_order(units, ["c", "a", "b"])) == ["c", "a", "b"]
    with pytest.raises(SettingError, match=r"^'a', 'c': no batch reaches it"):
        list(in_call_order(units, ["b"]))


class Backwards(nn.Module):
    """Calls its layers in another order than it makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.first(x))
        return found


def test_reconstruction_follows_the_calls() -> None:
    net = Backwards().eval()
    names: list[str] = []
    mpq.reconstruct(net, plan_of(net), [torch.randn(8, 4)], steps=1, finished=lambda own: names.append(own.name))
    assert names == ["first", "last"]


def test_a_model_that_is_itself_a_layer_is_reconstructed() -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 4).eval()
    plan = plan_of(net)
    learned = mpq.reconstruct(net, plan, [torch.randn(8, 4)], steps=5)
    mpq.verify(learned, plan)
