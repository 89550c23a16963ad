"""What a backend can run, and a plan projected onto it with every change reported."""

import logging
from collections.abc import Sequence
from dataclasses import fields, replace

from ..common.checks import shown
from ..common.text import first_few
from ..errors import SettingError
from .affine import SYMMETRIES, Affine, Symmetry
from .arguments import check_plan
from .capabilities import POLICIES, Capabilities, Change, Policy, listed, nearest
from .channels import joined
from .granular import FLOAT_BITS, INTEGER_BITS, Granularity, inputs_of
from .layers import LayerChoice, Part
from .legal_inputs import legal_input, with_input_changes
from .plan import Plan
from .scheme import Scheme
from .size import layer_size

LOG = logging.getLogger(__name__)

NEAREST: dict[Symmetry, tuple[Symmetry, ...]] = {"full": (True, False), True: ("full", False), False: (True, "full")}
"""What codes become where a backend has not theirs, the nearest first."""


def legalise(plan: Plan, capabilities: Capabilities, policy: Policy = "up") -> tuple[Plan, tuple[Change, ...]]:
    """Change a plan into one that the backend can run, and tell every change made to get there.

    Channel parts where the backend has none become one width, the highest of the parts. A layer of a kind that the
    backend does not quantize stays in floating point. Groups become the largest of the backend's that are no larger,
    or else its smallest that divide the inputs, or else whole channels. Two-interval layers become affine ones of the
    same true size. Where the backend rounds weights by itself, stochastic rounding becomes that to nearest.

    Args:
        plan: The plan; it is not changed.
        capabilities: What the backend can run: an adapter's CAPABILITIES, or your own.
        policy: "up" takes the next width the backend has, "nearest" the closest (of two the wider), "error" refuses any
            change.

    Returns:
        The plan that the backend can run, and the changes; none for a plan that it takes as it is.

    Raises:
        SettingError: The policy is unknown, a width has no other to go up to, or, under "error", layers would change.
            The message names every such layer, with the remedy.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> chip = mpq.Capabilities(backend="chip", bits=(4, 8), kinds=("linear",))
        >>> table = mpq.measure(torch.nn.Sequential(torch.nn.Linear(8, 8)))
        >>> plan, changes = mpq.legalise(mpq.Uniform(bits=3)(table), chip)
        >>> plan.layers[0].bits, len(changes)
        (4, 1)
    """
    if policy not in POLICIES:
        raise SettingError(f"policy: {shown(policy)} is not allowed; {', '.join(POLICIES)}")
    check_plan(plan)
    if not isinstance(capabilities, Capabilities):
        raise SettingError(
            f"capabilities: {shown(capabilities)} is no Capabilities; give an adapter's CAPABILITIES, or write them"
        )
    layers: list[LayerChoice] = []
    changes: list[Change] = []
    inputs = [legal_input(layer, capabilities, policy) for layer in plan.layers]
    for layer, (activations, _) in zip(plan.layers, inputs, strict=True):
        able = capabilities.beside(None if activations is None else activations.bits)
        legal, whys = _legal(layer, able, policy, None if activations is None else activations.bits)
        layers.append(legal.model_copy(update={"activations": None if legal.in_float else activations}))
        if whys:
            cost = layer_size(legal).total - layer_size(layer).total
            changes.append(Change(layer.name, _choice_text(layer), _choice_text(legal), "; ".join(whys), cost))
            LOG.debug("%s: %s becomes %s", layer.name, changes[-1].before, changes[-1].after)
    changes = with_input_changes(changes, plan.layers, layers, [why for _, why in inputs])
    LOG.info("%s: %d of %d layers changed", capabilities.backend, len(changes), len(plan.layers))
    if policy == "error" and changes:
        raise SettingError(refusal(changes, capabilities.backend))
    return plan.model_copy(update={"layers": tuple(layers)}), tuple(changes)


def require_legal(plan: Plan, capabilities: Capabilities) -> None:
    """Raise SettingError listing every layer that the backend cannot run as planned, and the remedy."""
    legalise(plan, capabilities, "error")


def refusal(changes: Sequence[Change], backend: str) -> str:
    """The sentence that refuses a plan."""
    shown = first_few([f"{change.layer!r}: {change.before}, but {change.why}" for change in changes])
    remedy = "Use legalise(plan, ...) first (mpq export --policy up, mpq check -o), or plan within its limits."
    return f"{backend} cannot run this plan as it is: {shown}. {remedy}"


def _legal(
    layer: LayerChoice, able: Capabilities, policy: Policy, activation_bits: int | None
) -> tuple[LayerChoice, list[str]]:
    """The layer as the backend can run it, and why it had to change."""
    in_float = [part.bits in FLOAT_BITS for part in layer.all_parts]
    if all(in_float):
        return layer, []
    # What a plan promises of a layer's coded size is for its own scheme and widths.
    left_in_float = layer.model_copy(update={"bits": 32, "parts": None, "coded_bytes": None})
    if layer.kind not in able.kinds:
        beside = "" if activation_bits is None else f" beside {activation_bits}-bit activations"
        return left_in_float, [
            f"{able.backend} does not quantize {layer.kind} layers{beside}, so it stays in floating point"
        ]
    if any(in_float) and not able.float_parts and policy == "up":
        return left_in_float, [
            f"{able.backend} has no layers partly in floating point, and nothing above but all of it"
        ]
    scheme, whys = _legal_scheme(layer, able)
    parts = layer.all_parts
    if len(parts) > 1 and not able.parts:
        whys.append(f"{able.backend} has one width per layer, so every channel goes up to the highest")
        parts = (Part(bits=max(part.bits for part in parts), channels=range(layer.channels)),)
    # What the interval bit paid for is one more bit of an ordinary code.
    extra = layer.scheme.interval_bits(2) - scheme.interval_bits(2)
    by_width: dict[int, list[Part]] = {}
    for part in sorted(parts, key=lambda part: part.bits):
        wanted = part.bits if part.bits in FLOAT_BITS else min(part.bits + extra, max(INTEGER_BITS))
        if wanted in FLOAT_BITS:
            width = wanted if able.float_parts else max(able.bits)
        else:
            width = _legal_width(wanted, layer.name, able, policy)
        if width != wanted:
            whys.append(f"{able.backend} has no {wanted} bits, only {listed(able.bits)}")
        if width < wanted and not scheme.scales_per_group and scheme.as_affine is not None:
            whys.append("the plan's step needs the width that it has, so scales are found anew")
            scheme = scheme.as_affine
        by_width.setdefault(width, []).append(part)
    return (_with(layer, scheme, by_width), whys) if whys else (layer, [])


def _legal_scheme(layer: LayerChoice, able: Capabilities) -> tuple[Scheme, list[str]]:
    scheme, whys = layer.scheme, list[str]()
    if not {scheme.name, layer.type} & {*able.schemes}:
        whys.append(f"{able.backend} has no {scheme.name} scheme")
        scheme = scheme.as_affine or Affine(granularity=scheme.granularity, group_size=scheme.group_size)
    affine = scheme.as_affine
    if affine is not None and affine.symmetric not in able.symmetric:
        whys.append(f"{able.backend} has only {' or '.join(SYMMETRIES[each] for each in able.symmetric)} scales")
        scheme = replace(affine, symmetric=next(each for each in NEAREST[affine.symmetric] if each in able.symmetric))
    drawn = scheme.as_affine
    if drawn is not None and drawn.stochastic is not None and not able.stochastic:
        whys.append(f"{able.backend} rounds weights itself, to nearest")
        scheme = replace(drawn, stochastic=None)
    if scheme.granularity not in able.granularities:
        whys.append(f"{able.backend} has no {scheme.granularity} scales, only {', '.join(able.granularities)}")
        # The nearest there is: coarser than groups, finer than a whole tensor.
        order: tuple[Granularity, ...] = ("per_channel", "per_tensor")
        granularity = next(g for g in order if g in able.granularities)
        scheme = replace(_with_granularity(scheme), granularity=granularity, group_size=None)
    size = scheme.group_size
    if size is not None and able.group_sizes is not None and size not in able.group_sizes:
        whys.append(f"{able.backend} has no groups of {size}, only of {listed(able.group_sizes)}")
        scheme = _regrouped(scheme, layer, able)
    return scheme, whys


def _regrouped(scheme: Scheme, layer: LayerChoice, able: Capabilities) -> Scheme:
    """The scheme with groups that the backend has, and that the layer's inputs divide into."""
    inputs = inputs_of(layer.shape, layer.channel_axis)
    size, fitting = scheme.group_size or 1, [own for own in able.group_sizes or () if inputs % own == 0]
    if fitting:  # of those that are no larger the largest, for finer scales lose nothing
        chosen = max((own for own in fitting if own <= size), default=min(fitting))
        return replace(_with_granularity(scheme), group_size=chosen)
    coarser: tuple[Granularity, ...] = ("per_channel", "per_tensor")
    granularity = next(g for g in coarser if g in able.granularities)
    return replace(_with_granularity(scheme), granularity=granularity, group_size=None)


def _with_granularity(scheme: Scheme) -> Scheme:
    """The scheme, or the affine one nearest to it where its granularity is no setting."""
    if "granularity" in {field.name for field in fields(scheme)}:
        return scheme
    return scheme.as_affine or Affine(granularity=scheme.granularity, group_size=scheme.group_size)


def _legal_width(bits: int, layer: str, able: Capabilities, policy: Policy) -> int:
    if bits in able.bits:
        return bits
    return nearest(bits, able.bits, policy, f"layer {layer!r}: {bits} bits", able.backend)


def _with(layer: LayerChoice, scheme: Scheme, by_width: dict[int, list[Part]]) -> LayerChoice:
    update = {"scheme": scheme, "bits": None, "parts": None, "coded_bytes": None}
    if len(by_width) == 1:
        return layer.model_copy(update={**update, "bits": next(iter(by_width))})
    parts = tuple(Part(bits=b, channels=joined(part.runs for part in by_width[b])) for b in sorted(by_width))
    return layer.model_copy(update={**update, "parts": parts})


def _choice_text(layer: LayerChoice) -> str:
    """`4 bits, asymmetric per_channel minmax`; channels as bits x count."""
    if layer.bits in FLOAT_BITS:
        return layer.bits_text
    return f"{layer.bits_text} bits, {layer.scheme}"
