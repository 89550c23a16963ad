"""What FX graph mode quantization would get wrong, or leave out, without a word: refused by name."""

from collections import Counter

import torch.fx
from torch import nn
from torch.ao.quantization.fx.tracer import QuantizationTracer

from mpq_plugins.errors import MismatchError, SettingError, SourceError, first_few, what_it_said
from mpq_plugins.legalise import Capabilities, require_legal
from mpq_plugins.plan import LayerChoice, Plan

from .folded import check_folding, check_model, planned_layers

CAPABILITIES = Capabilities(
    backend="fx",
    bits=tuple(range(1, 9)),
    kinds=("linear", "conv1d", "conv2d", "conv3d"),
    parts=True,
    activation_bits=(8,),
)


def check(plan: Plan, model: nn.Module) -> None:
    """Refuse everything that torch would get wrong, or leave out, without a word.

    Raises SettingError, MismatchError or SourceError, naming the layers and the remedy.
    """
    check_model(plan, model)
    if plan.activation_bits is None:
        raise SettingError(
            "fx: the plan leaves activations in floating point, and FX would leave its convolutions and linear layers "
            "in float too. Plan with activation bits 8 (with_activation_bits(8)), or use mpq_plugins.apply, the "
            "torchao adapter or PT2E, which take weights alone."
        )
    require_legal(plan, CAPABILITIES)
    graph = traced(model)
    check_folding(plan, model, "FX")
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    aliases = {name: next(n for n, m in modules.items() if m is module) for name, module in modules.items()}
    uses = Counter(aliases[name] for name in calls.elements())
    borrowed = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    problems = [_trouble(layer, modules[layer.name], uses, borrowed) for layer in planned_layers(plan)]
    found = [problem for problem in problems if problem]
    if found:
        raise MismatchError(f"fx cannot run this plan on {type(model).__name__}: {first_few(found)}")


def _trouble(layer: LayerChoice, module: nn.Module, uses: Counter[str], borrowed: set[str]) -> str | None:
    if f"{layer.name}.weight" in borrowed and uses[layer.name]:
        return f"{layer.name!r} lends its weight to a functional call, which FX would break: skip it"
    if getattr(module, "padding_mode", "zeros") != "zeros" or isinstance(getattr(module, "padding", 0), str):
        how = f"padding={module.padding!r}, padding_mode={module.padding_mode!r}"
        return f"{layer.name!r} has {how}, which FX gets wrong: pad with zeros and in numbers, or skip it"
    if layer.tied:
        return f"{layer.name!r} shares its weight with {layer.tied[0]!r}, and FX would make two of it: untie or skip it"
    if uses[layer.name] > 1:
        times = f"is called {uses[layer.name]} times"
        return f"{layer.name!r} {times}, and FX keeps one output scale for all: make copies or skip it"
    if uses[layer.name] == 0:
        return (
            f"{layer.name!r} is never called as a module where FX can see it (in MultiheadAttention, an LSTM, a "
            "subclass of a torch layer or a functional call), and would stay in float: skip it"
        )
    return None


def traced(model: nn.Module) -> torch.fx.Graph:
    """The graph that FX quantization sees. Raises SourceError where there is none."""
    try:
        return QuantizationTracer([], []).trace(model)
    except Exception as error:  # a user's forward may raise anything while being traced
        raise SourceError(
            f"{type(model).__name__}: torch.fx cannot trace it ({what_it_said(error)}). Rewrite what "
            "depends on values, quantize a submodule, or use mpq_plugins.apply or the torchao adapter, which do not "
            "trace."
        ) from error
