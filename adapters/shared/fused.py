"""What inference engines fuse into one matrix or one kernel, and what must therefore agree."""

from collections.abc import Hashable, Iterator, Mapping

from mpq_plugins.common.patterns import FUSED, families
from mpq_plugins.common.text import first_few
from mpq_plugins.errors import SettingError
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.names import NUMBERED, is_weight, layer_name
from mpq_plugins.plans.scheme import scales_per_layer

from .float_checkpoint import FloatCheckpoint

EXPERTS_TIE = "experts"


def require_fused_alike(source: FloatCheckpoint, engine: str, instead: str) -> None:
    """Refuse layers that an engine fuses and that differ in width or scheme, or of which some are in float.

    instead: what to do where the engine is not meant. Raises SettingError naming the tie that makes a plan fit.
    """
    schemes = _schemes(source)
    differing = [(tie, names) for tie, names in _families(schemes) if len({schemes[name] for name in names}) > 1]
    if not differing:
        return
    _, names = differing[0]
    said = first_few([f"{name!r} {_words(source.plan.by_any_name.get(name))}" for name in names], ", ")
    more = f", and {len(differing) - 1} others alike" if len(differing) > 1 else ""
    ties = " ".join(f"--tie {tie}" for tie in dict.fromkeys(tie for tie, _ in differing))
    raise SettingError(
        f"{engine} fuses layers that the plan has in different forms: {said}{more}. Plan with {ties}, and skip or pin "
        f"all of them or none; {instead}"
    )


def require_own_scales(source: FloatCheckpoint, engine: str, instead: str) -> None:
    """Refuse layers that an engine fuses and that have a scale of the layer each, of which the engine keeps one.

    instead: what to do where the engine is not meant. Raises SettingError.
    """
    for tie, names in _families(_schemes(source)):
        choices = [source.plan.by_any_name.get(name) for name in names]
        scaled = [choice for choice in choices if choice is not None and _has_own_scale(choice)]
        if len(names) > 1 and scaled:
            raise SettingError(
                f"layer {scaled[0].name!r}: {engine} fuses it with others ({tie}) under one scale of the layer, and "
                f"{scaled[0].scheme} gives each its own. Plan what is fused as other types; {instead}"
            )


def _has_own_scale(choice: LayerChoice) -> bool:
    return not choice.in_float and scales_per_layer(choice.scheme) > 0


def _schemes(source: FloatCheckpoint) -> dict[str, Hashable]:
    """Matrix by its name as a layer -> what must agree; None for what stays in float."""
    names = [layer_name(parameter) for parameter in source.tensors if is_weight(parameter)]
    matrices = [name for name in names if len(source.tensors[f"{name}.weight" if name else "weight"].shape) == 2]
    return {name: _key(source.plan.by_any_name.get(name)) for name in matrices}


def _key(choice: LayerChoice | None) -> Hashable:
    if choice is None or choice.in_float:
        return None
    scheme = choice.scheme.as_affine
    return choice.bits, scheme and (bool(scheme.symmetric), scheme.granularity == "per_group", scheme.group_size)


def _families(schemes: Mapping[str, Hashable]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The name of a tie, and layers that are one to an engine."""
    for tie in FUSED:
        if tie != EXPERTS_TIE:
            yield from ((tie, names) for names in families(tie, schemes).values())
    experts: dict[str, list[str]] = {}
    for name in schemes:
        numbered = NUMBERED.search(name)
        if numbered is not None:
            experts.setdefault(name[: numbered.start()], []).append(name)
    yield from ((EXPERTS_TIE, tuple(names)) for names in experts.values())


def _words(choice: LayerChoice | None) -> str:
    return "in float" if choice is None or choice.in_float else f"at {choice.bits_text} bits, {choice.scheme}"
