"""What FX graph mode quantization would get wrong, or leave out, without a word: refused by name."""

import copy
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.fx
from torch import Tensor, nn
from torch.ao.nn.intrinsic.modules.fused import _FusedModule
from torch.ao.quantization import FakeQuantizeBase, ObserverBase
from torch.ao.quantization.fx.tracer import QuantizationTracer

from mpq_plugins.common.text import first_few, what_it_said
from mpq_plugins.errors import MismatchError, SettingError, SourceError
from mpq_plugins.models.folding import Folded, borrowed_weights
from mpq_plugins.models.plain import why_not_plain
from mpq_plugins.models.running import first_input, run_model, seeded
from mpq_plugins.models.tracing import BATCH_NORMS, Traced, tensors_kept
from mpq_plugins.models.tracing import LAYERS as WEIGHTED
from mpq_plugins.plans.capabilities import Capabilities
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.legalise import require_legal
from mpq_plugins.plans.plan import Plan
from mpq_plugins.plans.storage import Storage

from ..shared.folded import INTEGER_SCHEMES, check_model, check_scales, check_state, planned_layers
from ..shared.outputs import difference

CAPABILITIES = Capabilities(
    backend="fx",
    bits=tuple(range(1, 9)),
    kinds=("linear", "conv1d", "conv2d", "conv3d"),
    schemes=INTEGER_SCHEMES,
    parts=True,
    activation_bits=(8,),
    input_symmetric=(False, True),
    storage=Storage("int8, a byte a weight", 8, scale_bits=64, zero_point_bits=64, one_scale=True),
)
SAME = 1e-3  # of the outputs' norm: what another order of additions may come to
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def check_settings(plan: Plan, model: nn.Module, traced: Traced | None = None) -> None:
    """Refuse what can be seen before the model is traced.

    Raises SettingError or MismatchError, naming the layers and the remedy.
    """
    check_model(plan, model, traced)
    if not plan.quantizes_inputs:
        raise SettingError(
            "fx: the plan leaves activations in floating point, and FX would leave its convolutions and linear layers "
            "in float too. Plan with activation bits 8 (with_activation_bits(8)), or use mpq_plugins.apply, the "
            "torchao adapter or PT2E, which take weights alone."
        )
    require_legal(plan, CAPABILITIES)
    observed = [repr(name) for name, m in model.named_modules() if isinstance(m, ObserverBase | FakeQuantizeBase)]
    if observed:
        raise SettingError(
            f"fx: {type(model).__name__} is prepared already ({first_few(observed, ', ')}); give the float model"
        )
    check_state(model, "FX")


def check_calls(plan: Plan, folded: Folded, graph: torch.fx.Graph) -> None:
    """Refuse planned layers that FX would break or leave out, as they are called in the graph of the folded copy.

    Raises MismatchError, naming the layers and the remedy.
    """
    check_scales(plan, folded.traced, "FX")
    modules = dict(folded.model.named_modules(remove_duplicate=False))
    calls = Counter(str(node.target) for node in _live(graph) if node.op == "call_module")
    aliases = {name: next(n for n, m in modules.items() if m is module) for name, module in modules.items()}
    uses = Counter(aliases[name] for name in calls.elements())
    borrowed = borrowed_weights(folded.traced)
    problems = [_trouble(layer, modules[layer.name], uses, borrowed) for layer in planned_layers(plan)]
    troubles = [problem for problem in problems if problem]
    if troubles:
        raise MismatchError(f"fx cannot run this plan on {type(folded.model).__name__}: {first_few(troubles)}")


def check_example(baked: nn.Module, exact: nn.Module, names: Collection[str], inputs: tuple[Any, ...]) -> None:
    """Refuse layers (`names`) that are given single samples, and a graph that gives other outputs than the model.

    Raises MismatchError; SettingError where the model does not run on the inputs.
    """
    try:
        with _single_samples(exact, names) as single, tensors_kept(exact):
            expected = _seeded_run(exact, inputs)
    except SettingError as error:
        raise SettingError(f"example_inputs: {str(error).removeprefix('batches: ')}") from error
    if single:
        raise MismatchError(
            f"fx: {first_few(single, ', ')} given one sample without a batch, which FX's "
            "kernels do not take: give batches (x.unsqueeze(0)), or skip the layer"
        )
    with tensors_kept(exact):
        problem = _problem_beside(baked, expected, inputs)
    if problem:
        raise MismatchError(
            f"fx: {type(exact).__name__} does something else as torch.fx traces it ({problem}): it may change values "
            "in place (x += y), draw random numbers, or depend on what it was traced with. Rewrite that, or use "
            "mpq_plugins.apply or the torchao adapter, which do not trace"
        )


def _problem_beside(baked: nn.Module, expected: Any, inputs: tuple[Any, ...]) -> str | None:
    """How a graph's outputs differ from the model's, in words, if they do; it may not even run."""
    try:
        return difference(_seeded_run(baked, inputs), expected, SAME)
    except SettingError as error:
        return f"it does not run: {what_it_said(error.__cause__ or error)}"


def _seeded_run(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """The model's outputs; a dropout that is always on drops the same every time."""
    with seeded(0):
        return run_model(model, inputs)


@contextmanager
def _single_samples(model: nn.Module, names: Collection[str]) -> Iterator[list[str]]:
    """The layers that are given samples without a batch's dimension, while the model runs."""
    single: list[str] = []

    def look(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        weight = cast(Tensor, layer.weight)
        if first_input(args, kwargs).dim() < weight.dim():
            single.append(f"{name!r} is")

    layers = {name: model.get_submodule(name) for name in names}
    handles = [layer.register_forward_pre_hook(partial(look, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield single
    finally:
        for handle in handles:
            handle.remove()


def _live(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """The nodes that the output comes of; FX drops the others."""
    live: set[torch.fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in live:
            live.update((node, *node.all_input_nodes))
    return [node for node in graph.nodes if node in live]


def _trouble(layer: LayerChoice, module: nn.Module, uses: Counter[str], borrowed: set[str]) -> str | None:
    return _unfit(layer, module, uses[layer.name]) or _misused(layer, uses, borrowed)


def _unfit(layer: LayerChoice, module: nn.Module, uses: int) -> str | None:
    """What of the layer itself FX has no kernel for."""
    if 0 in layer.shape:
        return f"{layer.name!r} has no weights ({list(layer.shape)}), which FX has no kernel for: skip it"
    if why := why_not_plain(module):
        return f"{layer.name!r} {why}, and FX would leave that out: skip it"
    if type(module) not in LAYERS and uses:
        return f"{layer.name!r} is a {type(module).__name__}, which FX would leave in float: skip it"
    if getattr(module, "padding_mode", "zeros") != "zeros" or isinstance(getattr(module, "padding", 0), str):
        how = f"padding={module.padding!r}, padding_mode={module.padding_mode!r}"
        return f"{layer.name!r} has {how}, which FX gets wrong: pad with zeros and in numbers, or skip it"
    return None


def _misused(layer: LayerChoice, uses: Counter[str], borrowed: set[str]) -> str | None:
    """How the model uses the layer in a way that FX does not follow."""
    if borrowed & {f"{layer.name}.weight", f"{layer.name}.bias"} and uses[layer.name]:
        return f"{layer.name!r} lends its weight to a functional call, which FX would break: skip it"
    if layer.tied:
        return f"{layer.name!r} shares its weight with {layer.tied[0]!r}, and FX would make two of it: untie or skip it"
    if uses[layer.name] > 1:
        times = f"is called {uses[layer.name]} times"
        return f"{layer.name!r} {times}, and FX keeps one output scale for all: make copies or skip it"
    if uses[layer.name] == 0:
        return (
            f"{layer.name!r} is never called as a module where FX can see it (in MultiheadAttention, an LSTM, a "
            "subclass of a torch layer or a functional call), or its result is never used, and would stay in float: "
            "skip it"
        )
    return None


def graph_for_fx(folded: Folded) -> torch.fx.Graph:
    """The graph that FX quantization sees, of the folded copy. Raises SourceError where there is none."""
    traced, copied = folded.traced, folded.model
    if any(_is_looked_into(module) for module in copied.modules()):
        return traced_by_fx(copied)
    for name, value in traced.constants.items():
        setattr(copied, name, value)
    return copy.deepcopy(traced.graph)  # nodes alone, to change


def _is_looked_into(module: nn.Module) -> bool:
    """Whether FX would see more or less of a module than a call: by its class it knows torch's own layers alone."""
    ours = type(module).__module__.startswith(("torch.nn", "torch.ao.nn"))
    return isinstance(module, _FusedModule) or (isinstance(module, (*WEIGHTED, *BATCH_NORMS)) and not ours)


def traced_by_fx(model: nn.Module) -> torch.fx.Graph:
    """A graph by FX's own tracer. Raises SourceError where there is none."""
    try:
        return QuantizationTracer([], []).trace(model)
    except Exception as error:  # a user's forward may raise anything while being traced
        raise SourceError(
            f"{type(model).__name__}: torch.fx cannot trace it ({what_it_said(error)}). Rewrite what "
            "depends on values, quantize a submodule, or use mpq_plugins.apply or the torchao adapter, which do not "
            "trace."
        ) from error
