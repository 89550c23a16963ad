"""Plain is what torch wrote: every way of computing otherwise that users have is told, and nothing else."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from mpq_plugins.models.input_ranges import quantize_input
from mpq_plugins.models.plain import is_plain, standard_class, why_not_plain

STANDARD: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 2),
    "linear without bias": lambda: nn.Linear(3, 2, bias=False),
    "conv1d": lambda: nn.Conv1d(2, 2, 3),
    "conv2d": lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
    "conv3d": lambda: nn.Conv3d(2, 2, 1),
    "transposed": lambda: nn.ConvTranspose2d(2, 4, 2, groups=2),
    "embedding": lambda: nn.Embedding(5, 3, padding_idx=0),
    "batch norm": lambda: nn.BatchNorm2d(2),
    "batch norm without weights": lambda: nn.BatchNorm1d(2, affine=False),
    "layer norm": lambda: nn.LayerNorm(3),
    "attention's own layer": lambda: nn.MultiheadAttention(4, 2).out_proj,
}


class Named(nn.Linear):
    """A subclass that only says more of itself."""

    note = "first"

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.note = "second"

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def extra_repr(self) -> str:
        return "named"

    def helper(self) -> int:
        return 1


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * math.sqrt(self.embedding_dim)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = super()._conv_forward(x, weight - weight.mean(), bias)
        return y


class Computed(nn.Linear):
    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return torch.ones(2, 3)


class Called(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return F.relu(super().__call__(x))


class Strided(nn.Conv2d):
    stride = 2  # type: ignore[assignment]


class Inherited(Scaled):
    pass


def computed() -> nn.Module:
    layer = nn.Linear(3, 2)
    layer.__class__ = Computed
    return layer


def patched() -> nn.Module:
    layer = nn.Linear(3, 2)
    layer.forward = lambda input: F.relu(F.linear(input, layer.weight))  # type: ignore[method-assign]
    return layer


def hooked() -> nn.Module:
    layer = nn.Linear(3, 2)
    layer.register_forward_hook(lambda *_: None)
    return layer


def hooked_before() -> nn.Module:
    layer = nn.Linear(3, 2)
    layer.register_forward_pre_hook(lambda *_: None)
    return layer


def pruned() -> nn.Module:
    layer = nn.Linear(3, 2)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


def replaced() -> nn.Module:
    layer = nn.Linear(3, 2)
    del layer._parameters["weight"]
    vars(layer)["weight"] = torch.zeros(2, 3)
    return layer


class Learned(nn.Parameter):
    pass


def own_parameter() -> nn.Module:
    layer = nn.Linear(3, 2)
    layer.weight = Learned(torch.zeros(2, 3))
    return layer


OTHERWISE: dict[str, Callable[[], nn.Module]] = {
    "a forward of its own": lambda: Scaled(5, 3),
    "a forward of its parent's own": lambda: Inherited(5, 3),
    "another convolution inside": lambda: Standardised(2, 2, 3),
    "a computed weight": computed,
    "a call of its own": lambda: Called(3, 2),
    "another setting": lambda: Strided(2, 2, 3),
    "a patched instance": patched,
    "a hook": hooked,
    "a hook before": hooked_before,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(3, 2)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(2, 2, 3)),
    "pruned": pruned,
    "a weight that is no parameter": replaced,
    "a parameter of another class": own_parameter,
    "max_norm": lambda: nn.Embedding(5, 3, max_norm=1.0),
    "lazy": lambda: nn.LazyLinear(2),
    "a user's module": lambda: type("Own", (nn.Module,), {})(),
}


@pytest.mark.parametrize("make", STANDARD.values(), ids=STANDARD.keys())
def test_torchs_own_are_plain(make: Callable[[], nn.Module]) -> None:
    assert why_not_plain(make()) == ""


@pytest.mark.parametrize("make", OTHERWISE.values(), ids=OTHERWISE.keys())
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_may_compute_otherwise_is_not(make: Callable[[], nn.Module]) -> None:
    assert not is_plain(make())


def test_a_subclass_that_computes_as_its_parent_is_plain() -> None:
    assert is_plain(Named(3, 2))
    assert standard_class(Named(3, 2)) is nn.Linear


def test_our_own_input_quantizer_is_no_foreign_hook() -> None:
    layer = nn.Linear(3, 2)
    quantize_input(layer, 8)
    assert is_plain(layer)
