"""Layers' inputs before they are planned: who reads which tensor, what is pinned, and who must agree."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import SettingError
from ..plans.granular import FLOAT_BITS
from ..plans.stats import LayerStats
from ..plans.table import LayerTable
from .budget_problem import Rules, matching_layers, pinned_layers, pinned_widths, tied_families


@dataclass(frozen=True)
class Inputs:
    """weights: layer -> the width its weights are given; widths: layer -> its input's; families: layer -> those tied to
    it; tensors: layer -> the tensor that it reads; counted: layer -> values of that tensor where it is counted with
    this layer, once among its readers; groups: layers whose inputs get one width, by any of them."""

    weights: Mapping[str, int]
    widths: Mapping[str, int]
    families: Mapping[str, tuple[str, ...]]
    tensors: Mapping[str, str]
    counted: Mapping[str, int]
    groups: Mapping[str, str]

    @classmethod
    def of(cls, rules: Rules, table: LayerTable) -> "Inputs":
        """Raises SettingError for what was not measured, and for pins and ties that cannot be kept."""
        _check_measured(table)
        weights = pinned_layers(rules, table)
        families = tied_families(rules, table, weights)
        readers = [layer for layer in table.layers if layer.kind != "embedding"]
        tensors = {layer.name: layer.inputs.tensor for layer in readers if layer.inputs is not None}
        planned = {layer.name for layer in readers if weights.get(layer.name) not in FLOAT_BITS}
        groups = _groups(
            [layer.name for layer in table.layers],
            [*families.values(), *_readers(tensors, planned).values()],
        )
        widths = _shared(_pinned_inputs(rules, table, planned, groups), groups)
        return cls(weights, widths, families, tensors, _counted(readers, weights), groups)

    def quantized(self, layer: LayerStats) -> bool:
        """Whether the layer's input is: not an index, nor read by weights in float."""
        return layer.name in self.tensors and self.weights.get(layer.name) not in FLOAT_BITS


def _check_measured(table: LayerTable) -> None:
    readers = [layer for layer in table.layers if layer.kind != "embedding"]
    missing = [layer.name for layer in readers if layer.inputs is None]
    remedy = "mpq_plugins.measure_activations(model, table, batches) measures inputs, as does mpq measure --activations"
    if table.activations is None or (readers and len(missing) == len(readers)):
        raise SettingError(f"input_bits: no layer's input was measured in this table; {remedy}")
    if missing:
        raise SettingError(f"input_bits: layer {missing[0]!r}: its input was not measured; {remedy}")


def _pinned_inputs(rules: Rules, table: LayerTable, planned: set[str], groups: Mapping[str, str]) -> dict[str, int]:
    """Layer -> the width of its input by a pin, which counts for all that share it, or else by the ends."""
    names = [layer.name for layer in table.layers]
    ends: dict[str, int] = {}
    if rules.ends is not None and rules.ends not in FLOAT_BITS:
        ends = {name: rules.ends for name in (*names[:1], *names[-1:]) if name in planned}
        if ends and rules.ends not in table.input_bits:
            measured = ", ".join(map(str, table.input_bits))
            raise SettingError(
                f"ends: {rules.ends} bits were not measured of inputs, which have {measured}; give one of these, or "
                "pin the layers, as 'conv1=1/4'"
            )
    pinned: dict[str, int] = {}
    for entry in rules.pin:
        pattern, _, bits = pinned_widths(entry)
        for name in matching_layers(pattern, table) if bits is not None else ():
            assert bits is not None
            if name not in planned:
                raise SettingError(
                    f"pin: layer {name!r} reads indices, or is left in float, so its input has no width; give its "
                    f"weights' alone, as '{name}=8'"
                )
            if pinned.setdefault(name, bits) != bits:
                raise SettingError(f"pin: the input of layer {name!r} is given both {pinned[name]} and {bits} bits")
    of_pins = {groups[name] for name in pinned}
    return {name: bits for name, bits in ends.items() if groups[name] not in of_pins} | pinned


def _shared(given: Mapping[str, int], groups: Mapping[str, str]) -> dict[str, int]:
    """The widths given, for all who must have them. Raises SettingError for those given different ones."""
    first: dict[str, str] = {}
    for name in given:
        other = first.setdefault(groups[name], name)
        if given[other] != given[name]:
            raise SettingError(
                f"pin: {other!r} and {name!r} read the same tensor, or are tied, so that their inputs get one width, "
                f"and are pinned to {given[other]} and {given[name]} bits; pin them alike"
            )
    return {name: given[first[group]] for name, group in groups.items() if group in first}


def _readers(tensors: Mapping[str, str], planned: Iterable[str]) -> dict[str, list[str]]:
    """Tensor -> the layers that read it quantized."""
    found: dict[str, list[str]] = {}
    for name in planned:
        found.setdefault(tensors[name], []).append(name)
    return found


def _counted(readers: Iterable[LayerStats], weights: Mapping[str, int]) -> dict[str, int]:
    """Layer -> values of its tensor, which is counted with the reader that needs most bits: in float, or else the
    first."""
    by_tensor: dict[str, list[LayerStats]] = {}
    for layer in readers:
        assert layer.inputs is not None
        by_tensor.setdefault(layer.inputs.tensor, []).append(layer)

    def float_bits(layer: LayerStats) -> int:
        bits = weights.get(layer.name, 0)
        return bits if bits in FLOAT_BITS else 0

    return {
        max(group, key=float_bits).name: max(layer.inputs.numel for layer in group if layer.inputs is not None)
        for group in by_tensor.values()
    }


def _groups(names: Iterable[str], together: Iterable[Iterable[str]]) -> dict[str, str]:
    """Name -> one of those that it shares its input's width with, the same for all of them."""
    parent = {name: name for name in names}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for members in together:
        first, *others = members
        for other in others:
            parent[root(other)] = root(first)
    return {name: root(name) for name in parent}
