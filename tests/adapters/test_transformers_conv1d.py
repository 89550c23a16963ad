"""transformers' Conv1D, whose weight is (inputs, outputs), is refused by every backend."""

from typing import Any

import pytest
import torch
from torch import nn

from mpq_plugins import Adapter, Affine, Uniform, measure
from mpq_plugins.common import registry
from mpq_plugins.errors import MismatchError, PluginError
from tests.adapters.test_contract import OURS

pytestmark = pytest.mark.filterwarnings("ignore")  # what backends warn of is theirs

conv1d: Any = pytest.importorskip("transformers.pytorch_utils").Conv1D


@pytest.mark.parametrize("name", OURS)
def test_it_is_refused_by_name(name: str) -> None:
    try:
        adapter: Adapter = registry.load("adapters", name)
    except PluginError as error:
        pytest.skip(f"{name}: its backend is not in this environment ({str(error)[-60:]})")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), conv1d(8, 8)).eval()
    plan = Uniform(bits=4)(measure(net, Affine(granularity="per_channel"))).with_activation_bits(8)
    with pytest.raises(MismatchError, match=r"'1': transformers' Conv1D.* Skip"):
        adapter.check(plan, net)
    alone = Uniform(bits=4)(measure(net, Affine(), skip=["1"])).with_activation_bits(None if name != "fx" else 8)
    adapter.check(alone, net)
