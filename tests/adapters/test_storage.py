"""What `check` says that a backend stores, beside the bytes of the model that it made."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpq_plugins import Affine, Plan, Uniform, legalise, measure
from mpq_plugins.adapters.contract import Adapter
from mpq_plugins.common import registry
from mpq_plugins.errors import PluginError
from mpq_plugins.models.kinds import quantizable_weights
from mpq_plugins.plans.storage import stored_bytes
from tests.adapters import nets
from tests.helpers.plans import with_layer

pytestmark = pytest.mark.filterwarnings("ignore")  # what backends warn of is theirs

BATCHES = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))]
LAYERS = ("conv1", "conv2", "fc")


def loaded(name: str) -> Adapter:
    try:
        adapter: Adapter = registry.load("adapters", name)
    except PluginError as error:
        pytest.skip(f"{name}: its backend is not in this environment ({str(error)[-60:]})")
    return adapter


def of_codes(weight: Any) -> int:
    """A torch quantized tensor's: codes, scales and zero points, as a file would hold them."""
    around = [weight.q_per_channel_scales(), weight.q_per_channel_zero_points()]
    return sum(tensor.nbytes for tensor in (weight.int_repr(), *around))


def in_fx(model: nn.Module) -> int:
    found = 0
    for name in LAYERS:
        module: Any = model.get_submodule(name)
        weight = module.weight() if callable(module.weight) else module.weight
        found += of_codes(weight) if weight.is_quantized else weight.nbytes
    return found


def in_torchao(model: nn.Module) -> int:
    found = 0
    for weight in quantizable_weights(model).values():
        inner = [getattr(weight, name, None) for name in ("qdata", "scale", "zero_point")]
        found += sum(tensor.nbytes for tensor in inner if tensor is not None) if inner[0] is not None else weight.nbytes
    return found


def in_pt2e(model: nn.Module) -> int:
    """The codes, what dequantizes them, and the float weights that the state dict keeps."""
    graph: Any = model
    targets = {
        str(node.target)
        for call in graph.graph.nodes
        if "dequantize_per_channel" in str(call.target)
        for node in call.all_input_nodes
    }
    tensors = [tensor for name, tensor in named_tensors(model).items() if name in targets or name.endswith(".weight")]
    return sum(tensor.nbytes for tensor in tensors if tensor.dim())


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    plain = {name: value for name, value in vars(model).items() if isinstance(value, Tensor)}
    return plain | {**dict(model.named_parameters()), **dict(model.named_buffers())}


def in_float(model: nn.Module) -> int:
    return sum(weight.nbytes for weight in quantizable_weights(model).values())


FOUND: dict[str, Callable[[nn.Module], int]] = {
    "fx": in_fx, "torchao": in_torchao, "pt2e": in_pt2e, "brevitas": in_float, "inc": in_float,
    "inc_classic": lambda made: in_float(made.model),  # type: ignore[arg-type]
}  # fmt: skip


def plans(adapter: Adapter, net: nn.Module) -> list[Plan]:
    """Four bits, two, channels of several widths, and a layer in float."""
    scheme = Affine(granularity="per_channel", symmetric=True)
    four, two = (Uniform(bits=bits)(measure(net, scheme, (bits,))) for bits in (4, 2))
    parts = ({"bits": 2, "channels": tuple(range(4))}, {"bits": 8, "channels": tuple(range(4, 10))})
    asked = [four, two, with_layer(four, "fc", bits=None, parts=parts), with_layer(four, "conv2", bits=16)]
    return [legalise(plan, adapter.CAPABILITIES)[0] for plan in asked]


@pytest.mark.parametrize("name", FOUND)
def test_the_bytes_are_those_of_the_model_that_it_made(name: str) -> None:
    adapter, net = loaded(name), nets.made(nets.SmallNet)
    storage = adapter.CAPABILITIES.storage
    assert storage is not None
    for plan in plans(adapter, net):
        made = adapter.apply(net, plan, BATCHES)
        assert stored_bytes(plan, storage, dict.fromkeys(LAYERS, 32)) == FOUND[name](made)


def test_groups_have_scales_of_their_own_in_torchao() -> None:
    adapter = loaded("torchao")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 8))
    for scheme in (Affine(granularity="per_group", group_size=4), Affine()):
        plan = Uniform(bits=3)(measure(net, scheme, (3,)))
        storage = adapter.CAPABILITIES.storage
        assert storage is not None
        assert stored_bytes(plan, storage, {"0": 32}) == in_torchao(adapter.apply(net, plan))
