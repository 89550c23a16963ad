"""Layers' inputs as a backend can quantize them, and what that changes."""

from collections.abc import Sequence
from dataclasses import replace

from .activations import Activations
from .capabilities import Capabilities, Change, Policy, listed, nearest
from .granular import FLOAT_BITS
from .layers import LayerChoice

ACTIVATIONS = "activations"  # what a Change of the inputs of all layers alike names


def legal_input(layer: LayerChoice, able: Capabilities, policy: Policy) -> tuple[Activations | None, str]:
    """How the backend can quantize a layer's input, and why that differs from the plan; nothing where it does not."""
    planned = layer.activations
    if layer.kind == "embedding":
        return None, ""
    if layer.in_float:
        return None, "" if planned is None else f"{able.backend} quantizes no inputs of layers in floating point"
    takers = able.activation_kinds or able.kinds
    if planned is not None and layer.kind in able.kinds and layer.kind not in takers and None in able.activation_bits:
        return None, f"{able.backend} quantizes no inputs of {layer.kind} layers"
    bits, whys = layer.activation_bits, list[str]()
    if bits not in able.activation_bits:
        bits = _legal_bits(layer, able, policy)
        whys.append(f"{able.backend} has activations at {listed(able.activation_bits)}{_cost(layer, bits)}")
    if bits is None:
        return None, "; ".join(whys)
    legal = replace(planned or Activations(bits, dynamic=able.input_dynamic[0]), bits=bits)
    if legal.dynamic not in able.input_dynamic:
        whys.append(f"{able.backend} has {' or '.join(map(_range_text, able.input_dynamic))} ranges of inputs")
        legal = Activations(bits, legal.symmetric, able.input_dynamic[0])
    if legal.symmetric not in able.input_symmetric:
        whys.append(f"{able.backend} has no {'symmetric' if legal.symmetric else 'asymmetric'} inputs")
        legal = replace(legal, symmetric=able.input_symmetric[0])
    return legal, "; ".join(whys)


def with_input_changes(
    changes: Sequence[Change], before: Sequence[LayerChoice], after: Sequence[LayerChoice], whys: Sequence[str]
) -> list[Change]:
    """The changes, in the layers' order, with those of their inputs.

    What happens to the inputs of all layers alike is one Change, before the others. A layer that goes to floating point
    says so already.
    """
    changed = {
        new.name: (_text(old.activations), _text(new.activations), why)
        for old, new, why in zip(before, after, whys, strict=True)
        if why and old.activations != new.activations and (old.in_float or not new.in_float)
    }
    takers = {layer.name for layer in after if layer.kind != "embedding" and not layer.in_float}
    by_layer = {change.layer: change for change in changes}
    if len({*changed.values()}) == 1 and takers <= changed.keys():
        old, new, why = next(iter(changed.values()))
        return [Change(ACTIVATIONS, old, new, why, 0), *changes]
    for name, (old, new, why) in changed.items():
        known = by_layer.get(name)
        by_layer[name] = (
            Change(name, f"inputs of {old}", f"inputs of {new}", why, 0)
            if known is None
            else replace(
                known,
                before=f"{known.before}, inputs of {old}",
                after=f"{known.after}, inputs of {new}",
                why=f"{known.why}; {why}",
            )
        )
    return [by_layer[layer.name] for layer in before if layer.name in by_layer]


def _legal_bits(layer: LayerChoice, able: Capabilities, policy: Policy) -> int | None:
    allowed = [b for b in able.activation_bits if b is not None]
    if layer.activation_bits is None:  # floating point is wider than anything; the widest there is comes nearest
        return max(allowed)
    above = any(bits > layer.activation_bits for bits in allowed)
    if not allowed or (policy == "up" and not above and None in able.activation_bits):
        return None  # floating point is above all
    what = f"layer {layer.name!r}: activations of {layer.activation_bits} bits"
    return nearest(layer.activation_bits, allowed, policy, what, able.backend)


def _cost(layer: LayerChoice, bits: int | None) -> str:
    """What another width takes beside the planned one, for inputs have no size that a plan knows."""
    if layer.activation_bits is None:
        return ""
    more = (max(FLOAT_BITS) if bits is None else bits) - layer.activation_bits
    return f", {abs(more)} bits {'more' if more > 0 else 'fewer'} for every input value"


def _text(activations: Activations | None) -> str:
    return "floating point" if activations is None else str(activations)


def _range_text(dynamic: str | None) -> str:
    return "static" if dynamic is None else f"dynamic {dynamic}"
