"""What backends that fold BatchNorm themselves are given: the folded weights, and their integers."""

from torch import Tensor, nn

from mpq_plugins.errors import MismatchError
from mpq_plugins.fold import conv_bn_pairs, fold_batch_norm
from mpq_plugins.lower import IntegerWeight, integer_weight
from mpq_plugins.plan import LayerChoice, Plan
from mpq_plugins.scheme import FLOAT_BITS
from mpq_plugins.weights import quantizable_weights


def planned_layers(plan: Plan) -> list[LayerChoice]:
    """The layers that the plan does not leave in floating point."""
    return [layer for layer in plan.layers if not all(part.bits in FLOAT_BITS for part in layer.groups)]


def folded_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of all layers by name, with BatchNorm folded in."""
    return quantizable_weights(fold_batch_norm(model))


def folded_integers(plan: Plan, model: nn.Module) -> dict[str, IntegerWeight]:
    """The integers of every planned layer, of the weights with BatchNorm folded in."""
    weights = folded_weights(model)
    return {layer.name: integer_weight(weights[layer.name], layer) for layer in planned_layers(plan)}


def check_folding(plan: Plan, model: nn.Module, backend: str) -> None:
    """Refuse per-tensor layers that were measured unfolded: folding changes their scale. Raises MismatchError."""
    pairs = {} if plan.fold_bn else conv_bn_pairs(model)
    unfolded = [
        f"{layer.name!r}"
        for layer in planned_layers(plan)
        if layer.name in pairs and layer.scheme.granularity == "per_tensor"
    ]
    if unfolded:
        raise MismatchError(
            f"{', '.join(unfolded[:5])}: measured unfolded, and {backend} folds BatchNorm, which changes the scale of "
            "a whole tensor: measure(model, fold_bn=True), or per_channel"
        )
