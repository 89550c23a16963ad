"""Files that other tools read: torch QCDQ, ONNX QCDQ and QONNX, their bit-widths checked against the plan's."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from brevitas.core.quant import BinaryQuant
from torch import Tensor, nn

from mpq_plugins.common.checks import path_of
from mpq_plugins.common.files import atomic_path
from mpq_plugins.common.text import first_few, what_it_said
from mpq_plugins.errors import SettingError, VerifyError
from mpq_plugins.models.copying import duplicate
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.plan import Plan

from ..shared.folded import planned_layers
from .graph import brevitas_settings_kept
from .read import input_quantizers, weight_codes
from .verification import verify_tuned

Format = Literal["torch_qcdq", "onnx_qcdq", "qonnx"]
FORMATS: tuple[Format, ...] = get_args(Format)
QCDQ_LEAST_BITS = 2  # QCDQ has no binary
STORED_BITS = 8  # what has no bounds of its own has its type's
OPSET = 17  # per-axis DequantizeLinear from 13


def export(
    quantized: nn.Module,
    plan: Plan,
    path: Path | str,
    example_inputs: Any,
    *,
    format: Format = "onnx_qcdq",
    plan_beside: bool = False,
) -> tuple[Path, ...]:
    """Write the model for another tool, check what lies in the file, and return the files written.

    Weights are to the bit those of the model. None of the formats holds widths that differ between the channels of a
    layer, which it states at the widest channel's, and QCDQ has no binary weights, which it states as 2 bits: an error,
    or with plan_beside the plan in `NAME.plan.json` beside the file. Scales per group are in none.

    Args:
        quantized: What `to_brevitas` made, tuned or not.
        plan: The plan.
        path: The file to write, taken as it is, whatever its suffix.
        example_inputs: A tensor or a tuple of arguments; in ONNX their first dimension may vary.
        format: `onnx_qcdq`, for onnxruntime and most others; `qonnx`, for FINN, hls4ml and the like; `torch_qcdq`,
            TorchScript.
        plan_beside: Whether to write the plan beside the file.

    Returns:
        The files written.

    Raises:
        SettingError: The format cannot hold the model or is unknown, or the model cannot be traced.
        VerifyError: The model does not hold the plan, or the file not the model.
    """
    target = path_of("path", path)
    if format not in FORMATS:
        raise SettingError(f"format: {format!r} is not allowed; {', '.join(FORMATS)}")
    verify_tuned(quantized, plan)
    _check_format(plan, format, plan_beside)
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    copied = duplicate(quantized).eval()
    expected = {
        layer.name: _on_its_grid(copied.get_submodule(layer.name), layer, format) for layer in planned_layers(plan)
    }
    with atomic_path(target) as temporary:
        _write(copied, temporary, inputs, format)
        written = _torch_graph(temporary) if format == "torch_qcdq" else _onnx_graph(temporary)
        _check_weights(expected, list(_read(written, format)), format)
        quantizing = len(input_quantizers(copied))
        _check_activations(plan, quantizing, list(_read_activations(written, format)), format)
        if not plan_beside:
            return (target,)
        beside = target.with_name(f"{target.stem}.plan.json")
        plan.save(beside)
    return target, beside


def _check_format(plan: Plan, format: Format, plan_beside: bool) -> None:
    grouped = [repr(layer.name) for layer in planned_layers(plan) if layer.scheme.granularity == "per_group"]
    if grouped:
        raise SettingError(f"{format} has no scales per group: {first_few(grouped, ', ')}. Plan per channel")
    lost = []
    for layer in planned_layers(plan):
        if layer.bits is None:
            lost.append(
                f"{layer.name!r} has channels of {_widths(layer)} bits and would be stated as {_stated(layer, format)}"
            )
        elif _stated(layer, format) != layer.bits:
            lost.append(f"{layer.name!r} has 1 bit and would be stated as {_stated(layer, format)}")
    if lost and not plan_beside:
        raise SettingError(
            f"{format} cannot hold this plan's widths: {first_few(lost)}. Weights would be right all the same: "
            "plan_beside=True writes the plan beside the file"
        )


def _stated(layer: LayerChoice, format: Format) -> int:
    """The bits that the file can state."""
    widest = max(part.bits for part in layer.all_parts)
    return widest if format == "qonnx" else max(widest, QCDQ_LEAST_BITS)


def _widths(layer: LayerChoice) -> str:
    return ", ".join(str(part.bits) for part in layer.all_parts)


class _BinaryAsInt(nn.Module):
    """A binary quantizer that says it has 2 bits: codes -1 and 1, and 0 for channels that are all 0."""

    def __init__(self, binary: nn.Module) -> None:
        super().__init__()
        self.binary = binary

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        value, scale, zero_point, bits = self.binary(x)
        return value, torch.where(scale == 0, 1.0, scale), zero_point, torch.full_like(bits, QCDQ_LEAST_BITS)


@dataclass(frozen=True)
class FileWeight:
    """A quantized weight as a file states it: what it means, and its bits."""

    value: Tensor
    bits: int


def _on_its_grid(module: nn.Module, layer: LayerChoice, format: Format) -> FileWeight:
    """Set a copied layer's weight to its quantized one, which every format rounds to itself; what the file must say."""
    weight = cast(nn.Parameter, module.weight)
    value = weight_codes(module).value.reshape(weight.shape)
    weight.data.copy_(value)
    proxy = cast(Any, module).weight_quant
    if isinstance(proxy.tensor_quant, BinaryQuant) and format != "qonnx":
        proxy.tensor_quant = _BinaryAsInt(proxy.tensor_quant)
    return FileWeight(value, _stated(layer, format))


def _write(model: nn.Module, path: Path, inputs: tuple[Any, ...], format: Format) -> None:
    from brevitas.export import export_onnx_qcdq, export_qonnx, export_torch_qcdq

    try:
        with brevitas_settings_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a trace warns of every number that it takes for a constant
            if format == "torch_qcdq":
                export_torch_qcdq(model, args=inputs, export_path=str(path))
                return
            names = [f"input_{i}" for i in range(len(inputs))]
            batched = [name for name, value in zip(names, inputs, strict=True) if getattr(value, "ndim", 0)]
            exporter = export_qonnx if format == "qonnx" else export_onnx_qcdq
            # torch takes a GraphModule for TorchScript, whose graph has outputs; within another module it does not.
            whole = nn.Sequential(model) if isinstance(model, torch.fx.GraphModule) and len(inputs) == 1 else model
            exporter(
                whole, args=inputs, export_path=str(path), dynamo=False, opset_version=OPSET,
                keep_initializers_as_inputs=False, input_names=names,
                dynamic_axes={name: {0: "batch"} for name in batched},
            )  # fmt: skip
    except ImportError as error:
        raise SettingError(f"{format}: {error}. pip install 'mpq-plugins[brevitas]'") from error
    except Exception as error:  # a user's forward may raise anything while being traced
        raise SettingError(f"{format}: {type(model).__name__} cannot be exported ({what_it_said(error)})") from error


def _check_weights(expected: dict[str, FileWeight], stored: list[FileWeight], format: Format) -> None:
    """Find every layer's weight in the file, with its bits."""
    problems = []
    for name, layer in expected.items():
        same = [
            weight for weight in stored if weight.value.shape == layer.value.shape and weight.value.equal(layer.value)
        ]
        if not same:
            problems.append(f"{name!r} is not in the file as it is in the model (does the example reach it?)")
        elif layer.bits not in {weight.bits for weight in same}:
            problems.append(f"{name!r} has {same[0].bits} bits in the file, and not {layer.bits}")
    if problems:
        raise VerifyError(f"{format}: the file does not hold the model: {first_few(problems)}")


def _check_activations(plan: Plan, layers: int, stored: list[int], format: Format) -> None:
    """Every planned layer's input is quantized in the file, to the plan's bits."""
    widths = {layer.activation_bits for layer in planned_layers(plan)} - {None}
    expected = widths if layers else set()
    if {*stored} != expected or len(stored) < layers:
        raise VerifyError(
            f"{format}: the file quantizes {len(stored)} inputs, to {sorted({*stored})} bits; the model those of "
            f"{layers} layers, to {sorted(map(str, expected))}"
        )


def _read(written: Any, format: Format) -> Iterator[FileWeight]:
    """The quantized weights of a file."""
    return _read_torch(written) if format == "torch_qcdq" else _read_onnx(*written)


def _torch_graph(path: Path) -> Any:
    """A TorchScript file's graph; to be kept as long as its nodes are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is what the format is
        return torch.jit.load(str(path)).inlined_graph


def _read_torch(graph: Any) -> Iterator[FileWeight]:
    """clamp(codes, low, high) - zero_point, times scale; 8 unsigned bits have no clamp."""
    for node in graph.findAllNodes("aten::mul"):
        difference, scale = (use.node() for use in node.inputs())
        if difference.kind() != "aten::sub" or scale.kind() != "prim::Constant":
            continue
        codes, zero_point = (use.node() for use in list(difference.inputs())[:2])
        low, high = 0, 255
        if codes.kind() == "aten::clamp":
            codes, low, high = (_constant(use.node()) for use in codes.inputs())
        else:
            codes = _constant(codes)
        if zero_point.kind() == "aten::to":
            zero_point = next(iter(zero_point.inputs())).node()
        if isinstance(codes, Tensor):
            zero, unit = (torch.as_tensor(_constant(value)) for value in (zero_point, scale))
            value = (codes.clamp(low, high).int() - zero.int()) * unit
            yield FileWeight(value.float(), _bits(low, high))


def _read_activations(written: Any, format: Format) -> Iterator[int]:
    """The bits of quantized inputs in a file."""
    if format == "torch_qcdq":
        for node in written.findAllNodes("aten::quantize_per_tensor"):
            codes = next(use.user for use in node.output().uses())  # int_repr
            clamps = [use.user for use in codes.output().uses() if use.user.kind() == "aten::clamp"]
            bounds = [[_constant(bound.node()) for bound in list(clamp.inputs())[1:]] for clamp in clamps]
            yield _bits(*bounds[0]) if bounds else STORED_BITS
        return
    graph, values = written
    clips = {node.input[0]: node for node in graph.node if node.op_type == "Clip"}
    for node in graph.node:
        if node.op_type in ("Quant", "IntQuant") and node.input[0] not in values:
            yield int(values[node.input[3]])
        elif node.op_type == "QuantizeLinear":
            clip = clips.get(node.output[0])
            yield STORED_BITS if clip is None else _bits(*(int(values[bound]) for bound in clip.input[1:]))


def _constant(node: Any) -> Any:
    return node.output().toIValue() if node.kind() == "prim::Constant" else None


def _onnx_graph(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """The graph, and what is constant in it by name."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    values = {stored.name: torch.from_numpy(numpy_helper.to_array(stored).copy()) for stored in graph.initializer}
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in values:
            values[node.output[0]] = values[node.input[0]]
        elif node.op_type == "Constant":
            values[node.output[0]] = torch.from_numpy(numpy_helper.to_array(node.attribute[0].t).copy())
    return graph, values


def _read_onnx(graph: Any, values: dict[str, Tensor]) -> Iterator[FileWeight]:
    clips = {node.output[0]: node for node in graph.node if node.op_type == "Clip"}
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            low, high, codes = 0, 255, node.input[0]
            if codes in clips:
                codes, low, high = clips[codes].input[0], *(int(values[bound]) for bound in clips[codes].input[1:])
            if codes in values:
                scale, zero_point = (values[name] for name in node.input[1:])
                yield FileWeight(_dequantized(values[codes], scale, zero_point, node), _bits(low, high))
        elif node.op_type in ("Quant", "IntQuant") and node.input[0] in values:
            weight, scale, zero_point, bits = (values[name] for name in node.input)
            yield FileWeight((torch.round(weight / scale + zero_point) - zero_point) * scale, int(bits))
        elif node.op_type == "BipolarQuant" and node.input[0] in values:
            weight, scale = (values[name] for name in node.input)
            yield FileWeight(torch.where(weight < 0, -1.0, 1.0) * scale, 1)


def _dequantized(codes: Tensor, scale: Tensor, zero_point: Tensor, node: Any) -> Tensor:
    shape = [1] * codes.dim()
    if scale.dim():
        shape[next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)] = -1
    return (codes.int() - zero_point.int().reshape(shape)) * scale.reshape(shape)


def _bits(low: int, high: int) -> int:
    """The width of codes from low to high, narrow ones included."""
    return int(high - min(low, -high - 1 if low < 0 else 0) + 1).bit_length() - 1
