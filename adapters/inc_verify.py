"""Does a model that Neural Compressor quantized hold what the plan says: weights to the bit, or packed codes."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mpq_plugins.errors import VerifyError, first_few
from mpq_plugins.fold import fold_batch_norm
from mpq_plugins.lower import IntegerWeight, integer_weight
from mpq_plugins.plan import Plan
from mpq_plugins.simulate import simulate
from mpq_plugins.weights import quantizable_weights

from .folded import changed_state, check_model, check_module, planned_by_name
from .inc_quiet import quiet_import

with quiet_import():
    from neural_compressor.torch.algorithms.weight_only.modules import INCWeightOnlyLinear

CODES_PER_TIE = 10_000


@dataclass(frozen=True)
class LayerCheck:
    """One layer as it lies in the quantized model: its bits by channel count, and whether its codes are packed.

    ties: packed codes one off the plan's, for weights in the middle between two levels.
    """

    layer: str
    bits: tuple[tuple[int, int], ...]
    packed: bool
    ties: int = 0


def verify(quantized: nn.Module, plan: Plan, model: nn.Module) -> tuple[LayerCheck, ...]:
    """Compare every layer with what the plan makes of the float `model`, and all else with the model's own.

    Weights must be the plan's to the bit. Where Neural Compressor has packed a layer (`to_inc`), codes must be the
    plan's, scales and biases too in float16. Its arithmetic differs in the last bit, so a weight in the middle between
    two levels may go to the other one: one code in 10,000 may, and is counted. Raises VerifyError listing what is
    wrong, MismatchError for another model.
    """
    check_model(plan, model)
    check_module(quantized)
    original = fold_batch_norm(model) if plan.fold_bn else model
    weights, planned = quantizable_weights(original), planned_by_name(plan)
    modules = dict(quantized.named_modules(remove_duplicate=False))
    problems: list[str] = []
    checks: list[LayerCheck] = []
    packed: list[str] = []
    for name, weight in weights.items():
        module, layer = modules.get(name), planned.get(name)
        ties = 0
        if module is None:
            problem = "is missing"
        elif isinstance(module, INCWeightOnlyLinear):
            packed.append(name)
            bias = cast("Tensor | None", getattr(original.get_submodule(name), "bias", None))
            problem = "is packed, and the plan leaves it in float"
            if layer is not None:
                problem, ties = _packed_problem(module, integer_weight(weight, layer), layer.bits, bias)
        else:
            made = weight if layer is None else simulate(weight, layer)
            same = isinstance(module.weight, Tensor) and module.weight.equal(made)
            problem = "" if same else "is not what the plan makes of the model's"
        if problem:
            problems.append(f"{name!r} {problem}")
        elif layer is not None:
            checks.append(LayerCheck(name, layer.widths, name in packed, ties))
    own = {f"{name}.weight".lstrip(".") for name in weights} | {f"{name}.bias" for name in packed}
    problems += changed_state(quantized, original, own | _tied_names(plan))
    if problems:
        raise VerifyError(f"{type(quantized).__name__} does not hold the plan: {first_few(problems)}")
    return tuple(checks)


def _tied_names(plan: Plan) -> set[str]:
    return {f"{name}.weight" for layer in plan.layers for name in layer.names}


def _packed_problem(module: Any, own: IntegerWeight, bits: int | None, bias: Tensor | None) -> tuple[str, int]:
    """How a packed layer differs from the plan's integers, in words, if it does; and how many ties went elsewhere."""
    if module.bits != bits:
        return f"is packed at {module.bits} bits, the plan has {bits}", 0
    unpacked = module.unpack()
    codes, scale, zero_point = unpacked["int_weight"].long(), unpacked["scales"], unpacked["zp"].long()
    if scale.shape != own.scale.shape:
        return f"is packed in {scale.shape[1]} groups, the plan has {own.scale.shape[1]}", 0
    group = codes.shape[1] // scale.shape[1]
    theirs = codes - zero_point.repeat_interleave(group, 1)
    off = (own.codes.long() - own.zero_point.repeat_interleave(group, 1) - theirs).abs()
    ties = int((off == 1).sum())
    if (off > 1).any() or ties > max(1, codes.numel() // CODES_PER_TIE):
        return f"has {int((off > 0).sum())} of {codes.numel()} codes that are not the plan's", ties
    if not torch.allclose(scale.double(), own.scale.double(), rtol=torch.finfo(scale.dtype).eps, atol=0):
        return "has other scales", ties
    if bias is not None and not torch.equal(module.bias, bias.to(module.bias.dtype)):
        return "has another bias", ties
    return "", ties
