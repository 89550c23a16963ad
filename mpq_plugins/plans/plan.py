"""Plan: bits per layer, or per group of output channels, as versioned JSON that several backends consume."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    model_validator,
)

from ..common.checks import first_problem, path_of, shown
from ..common.checksum import is_damaged, sealed, unsealed
from ..common.documents import Strict, load_json, parse_json
from ..common.files import open_regular, write_text
from ..common.public import public
from ..common.text import first_few
from ..errors import FormatError, SettingError
from .activations import Activations, check_input_bits
from .granular import FLOAT_BITS
from .inline import plan_html
from .layers import LayerChoice, check_once
from .names import is_weight, layer_name, weight_name
from .size import PlanSize, plan_size

PLAN_FORMAT = "mpq-plan"
PLAN_VERSION = 5
FOUND = {"budget": ("objective", "gap", "binding"), "ptilmpq": ("alpha",)}  # among parameters, until version 2


def _found_apart(plan: dict[str, Any]) -> dict[str, Any]:
    """A version 2 plan as version 3 has it: what its allocator found is no parameter."""
    record = plan.get("allocator")
    parameters = record.get("parameters") if isinstance(record, dict) else None
    if not isinstance(record, dict) or not isinstance(parameters, dict):
        return {**plan, "version": 3}  # which is refused for what it lacks
    names = FOUND.get(str(record.get("name")), ())
    sized = any(parameters.get(name) is not None for name in ("average_bits", "size_bytes"))
    found = {name: parameters[name] for name in names if name in parameters and (sized or name != "alpha")}
    kept = {name: value for name, value in parameters.items() if name not in found}
    apart = {**record, "parameters": kept, **({"found": found} if found else {})}
    return {**plan, "allocator": apart, "version": 3}


def _inputs_by_layer(plan: dict[str, Any]) -> dict[str, Any]:
    """A version 4 plan as version 5 has it: what was said once of all inputs, each quantized layer says of its own."""
    bits = plan.get("activation_bits")
    if bits is None or not isinstance(plan.get("layers"), list):
        return {**{key: value for key, value in plan.items() if key != "activation_bits"}, "version": 5}

    def takes(layer: Any) -> bool:
        if not isinstance(layer, dict) or layer.get("kind") == "embedding":
            return False
        parts = layer.get("parts")
        given = [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else [layer]
        widths = [each.get("bits") for each in given]
        return any(width not in FLOAT_BITS for width in widths)

    inputs = {"bits": bits, "symmetric": False, "range": "mse"}
    layers = [{**layer, "activations": inputs} if takes(layer) else layer for layer in plan["layers"]]
    kept = {key: value for key, value in plan.items() if key != "activation_bits"}
    return {**kept, "layers": layers, "version": 5}


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: lambda plan: {**plan, "version": 2},
    2: _found_apart,
    3: lambda plan: {**plan, "version": 4},
    4: _inputs_by_layer,
}
"""Version -> a function from that version's document, without its checksum, to the next one's. Version 1 had none, and
version 2 neither rest_bytes nor what an allocator found apart from its parameters; version 3 no coded_bytes; version
4 no types, no full range and no 16-bit scales, and one activation_bits for the inputs of all layers."""

SAID_WITHIN = 256  # bytes from its beginning: the first thing that a plan says
DEEPEST = 32  # of parameters in one another


def _check_depth(value: Any, most: int = DEEPEST) -> Any:
    """Refuse what is nested so deeply that it could be read but not written again."""
    if not most:
        raise ValueError(f"nested more than {DEEPEST} deep")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        _check_depth(inner, most - 1)
    return value


class AllocatorRecord(Strict):
    """Which allocator made the plan, with which parameters, and what it found beside the plan, such as a gap."""

    name: str
    parameters: Annotated[dict[str, Any], AfterValidator(_check_depth)]
    found: Annotated[dict[str, Any], AfterValidator(_check_depth)] = Field(default_factory=dict)


@public
class Plan(Strict):
    """Bits for every quantizable layer of one model.

    Attributes:
        format: What says that a file is a plan.
        version: Version of the format.
        made_with: Versions of the packages that made it.
        allocator: Name, parameters and findings of the allocator that made it.
        model: Fingerprint of the weights the plan was made for.
        fold_bn: Whether BatchNorm was folded when they were measured.
        skipped: Quantizable layers left in floating point on request, or by default.
        weights: Of a torch checkpoint with several sets of weights, the key of those it was made from. None where
            nothing had to be said.
        left_alone: Parameters that a bare file's reader could take for layers' weights, and that are none.
        rest_bytes: Bytes of all that the model stores beside the layers' weights (biases, norms, buffers, skipped
            layers). None where that is not known.
        layers: What each layer gets.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> plan = mpq.Uniform(bits=4)(mpq.measure(torch.nn.Sequential(torch.nn.Linear(8, 8))))
        >>> plan.save("net.plan.json")
        >>> mpq.Plan.load("net.plan.json") == plan
        True
    """

    format: Literal["mpq-plan"] = "mpq-plan"
    version: Literal[5] = 5
    made_with: dict[str, str]
    allocator: AllocatorRecord
    model: str
    fold_bn: bool
    skipped: tuple[str, ...] = ()
    weights: str | None = None
    left_alone: tuple[str, ...] = ()
    rest_bytes: Annotated[int, Field(ge=0)] | None = None
    layers: tuple[LayerChoice, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_once((layer.names for layer in self.layers), self.skipped)
        return self

    @cached_property
    def by_name(self) -> Mapping[str, LayerChoice]:
        """The layers by name."""
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def by_any_name(self) -> Mapping[str, LayerChoice]:
        """The layers by name and by the tied names of their weights."""
        return {name: layer for layer in self.layers for name in layer.names}

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Make a copy with some fields replaced, unchecked.

        What was computed of the fields, as `by_name`, is not copied.

        Args:
            update: New values by field name.
            deep: Whether fields are copied too.

        Returns:
            The copy.
        """
        copied = super().model_copy(update=update, deep=deep)
        for name, value in vars(type(self)).items():
            if isinstance(value, cached_property):
                vars(copied).pop(name, None)
        return copied

    def renamed(self, names: Mapping[str, str]) -> "Plan":
        """Make the same plan for a model that calls its layers otherwise.

        Args:
            names: New names by old ones; what is not in it keeps its name.

        Returns:
            The plan.

        Raises:
            SettingError: The names are no mapping.
        """
        if not isinstance(names, Mapping):
            raise SettingError(f"names: is a {type(names).__name__}; give a mapping of old names to new ones")
        if all(name == new_name for name, new_name in names.items()):
            return self

        def new(name: str) -> str:
            return names.get(name, name)

        layers = tuple(
            layer.model_copy(update={"name": new(layer.name), "tied": tuple(map(new, layer.tied))})
            for layer in self.layers
        )
        left_alone = tuple(_with_layer_name(parameter, new) for parameter in self.left_alone)
        skipped = tuple(map(new, self.skipped))
        return self.model_copy(update={"layers": layers, "skipped": skipped, "left_alone": left_alone})

    def document(self) -> dict[str, Any]:
        """Give what its JSON says, without a checksum.

        Returns:
            Plain dicts, lists, texts and numbers.
        """
        document = self.model_dump(mode="json", exclude_none=True)
        if not self.left_alone:  # as plans were before there was such a field
            del document["left_alone"]
        if not self.allocator.found:
            del document["allocator"]["found"]
        layers = [{key: value for key, value in layer.items() if value != []} for layer in document["layers"]]
        return {**document, "layers": layers}

    def to_json(self) -> str:
        """Write readable JSON in a stable order, one line per layer, with its checksum.

        Returns:
            The text; equal plans give equal bytes.
        """
        document = sealed(self.document())
        layers = document.pop("layers")
        head = "".join(f"  {_one_line(key)}: {_one_line(value)},\n" for key, value in document.items())
        lines = ",\n".join(f"    {_one_line(layer)}" for layer in layers)
        return f'{{\n{head}  "layers": [\n{lines}\n  ]\n}}\n'

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return plan_html(self.allocator.name, self.layers, self.size())

    def save(self, path: str | Path) -> None:
        """Write the plan; an interruption leaves an older file whole.

        Args:
            path: The file to write.
        """
        write_text(path_of("path", path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read, migrate and validate a plan.

        Args:
            path: The plan's file.

        Returns:
            The plan.

        Raises:
            FormatError: The file is no plan, damaged, or newer than this version. The message names file, field and
                value.
        """
        path = path_of("path", path)
        try:
            document = load_json(path)
        except OSError as error:
            raise FormatError(f"{path}: cannot read it ({error.strerror}). Give a plan file.") from error
        except ValueError as error:
            raise FormatError(_no_json(str(path), error)) from error
        return cls.from_document(document, str(path))

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """Read a plan's text as `load` reads its file.

        Args:
            json_data: The text.
            **options: Taken as pydantic has them, and not used.

        Returns:
            The plan.

        Raises:
            FormatError: The text is no plan.
        """
        try:
            document = parse_json(json_data if isinstance(json_data, str) else bytes(json_data))
        except ValueError as error:
            raise FormatError(_no_json("plan", error)) from error
        return cls.from_document(document, "plan")

    @classmethod
    def from_document(cls, document: Any, where: str) -> Self:
        """Migrate and validate a parsed plan.

        Args:
            document: What its JSON says.
            where: What names it in errors.

        Returns:
            The plan.

        Raises:
            FormatError: It is no plan, damaged, or newer than this version.
        """
        if not isinstance(document, dict) or document.get("format") != PLAN_FORMAT:
            raise FormatError(f"{where}: not a plan; 'format' must be {PLAN_FORMAT!r}")
        version = document.get("version")
        if type(version) is not int or version < 1:
            raise FormatError(f"{where}: version: {version!r:.40} is not allowed; 1 to {PLAN_VERSION}")
        if version > PLAN_VERSION:
            raise FormatError(
                f"{where}: plan version {version}, and this mpq-plugins reads up to {PLAN_VERSION}. Upgrade it."
            )
        if is_damaged(document):
            raise FormatError(
                f"{where}: was damaged or edited since it was written, its checksum is another's. If somebody edited "
                "it on purpose, remove the line 'checksum'; else make or fetch the plan again."
            )
        plain = unsealed(document)
        for step in range(version, PLAN_VERSION):
            plain = MIGRATIONS[step](plain)
        try:
            # As JSON, where a list may be a tuple, but nothing else may be what it is not.
            return super().model_validate_json(json.dumps(plain, default=repr))
        except ValidationError as error:
            raise FormatError(f"{where}: {first_problem(error)}") from error

    def size(self, scale_bits: int | None = None) -> PlanSize:
        """Count what the plan promises, in bits and bytes; see size.plan_size.

        Args:
            scale_bits: Bits of a scale or centroid, 32 or 16; None for what each layer's scheme has.

        Returns:
            The sizes.

        Raises:
            SettingError: scale_bits is neither.
        """
        return replace(plan_size(self.layers, scale_bits), rest_bytes=self.rest_bytes, skipped=len(self.skipped))

    def diff(self, other: "Plan") -> "tuple[Difference, ...]":
        """List the layers in which another plan differs, in this plan's order, then those that only the other has.

        Args:
            other: The plan it is set against.

        Returns:
            A Difference for each of these layers.

        Raises:
            SettingError: The other is no plan.
        """
        if not isinstance(other, Plan):
            raise SettingError(f"other: is a {type(other).__name__}, no Plan; Plan.load reads one")
        names = [*self.by_name, *(name for name in other.by_name if name not in self.by_name)]
        pairs = ((name, self.by_name.get(name), other.by_name.get(name)) for name in names)
        return tuple(Difference(name=n, before=a, after=b) for n, a, b in pairs if a != b)

    @property
    def quantizes_inputs(self) -> bool:
        """Whether any layer's input is quantized."""
        return any(layer.activations is not None for layer in self.layers)

    @property
    def activations_text(self) -> str:
        """`floating point`, `8 bits`, `4 to 8 bits`, or `8 bits in 3 of 12 layers`."""
        takers = [layer for layer in self.layers if layer.kind != "embedding" and not layer.in_float]
        widths = sorted(layer.activation_bits for layer in self.layers if layer.activation_bits is not None)
        if not widths:
            return "floating point"
        text = f"{widths[0]} bits" if widths[0] == widths[-1] else f"{widths[0]} to {widths[-1]} bits"
        return text if len(widths) == len(takers) else f"{text} in {len(widths)} of {len(takers)} layers"

    def with_activation_bits(self, bits: int | None) -> "Plan":
        """Make the same plan with inputs of these bits, their ranges static, asymmetric and of least squared error.

        Args:
            bits: 2 to 16, or None for floating point.

        Returns:
            The plan.

        Raises:
            SettingError: The bits are none of these.
        """
        return self.with_activations(None if bits is None else Activations(check_input_bits(bits)))

    def with_activations(self, activations: "Activations | Mapping[str, Activations | None] | None") -> "Plan":
        """Make the same plan with its layers' inputs quantized otherwise.

        Args:
            activations: For all layers that have quantized weights and take no indices; None for floating point. Or for
                each of some layers, by any of its names; the others keep theirs.

        Returns:
            The plan.

        Raises:
            SettingError: The plan has no such layer, or a layer cannot take such inputs.

        Examples:
            >>> import mpq_plugins as mpq, torch
            >>> plan = mpq.Uniform(bits=4)(mpq.measure(torch.nn.Sequential(torch.nn.Linear(8, 8))))
            >>> plan.with_activations({"0": mpq.Activations(8, symmetric=True)}).layers[0].activation_bits
            8
        """
        if isinstance(activations, Mapping):
            floats = [name for name, own in activations.items() if own is not None and self._layer_of(name).in_float]
            if floats:
                raise SettingError(
                    f"layer {floats[0]!r}: stays in floating point, weights and input; plan bits for its weights too"
                )
            given = {self._layer_of(name).name: own for name, own in activations.items()}
        else:
            takers = [layer for layer in self.layers if not layer.in_float and layer.kind != "embedding"]
            given = dict.fromkeys(self.by_name) | {layer.name: activations for layer in takers}
        layers = tuple(
            _with_activations(layer, given[layer.name]) if layer.name in given else layer for layer in self.layers
        )
        return self.model_copy(update={"layers": layers})

    def _layer_of(self, name: str) -> LayerChoice:
        if name not in self.by_any_name:
            known = first_few([repr(own) for own in self.by_name], ", ")
            raise SettingError(f"activations: the plan has no layer {name!r}; it has {known}")
        return self.by_any_name[name]


def is_plan(path: Path) -> bool:
    """Whether the file says that it is a plan; looks at its beginning only."""
    try:
        with open_regular(path) as file:
            return f'"format": "{PLAN_FORMAT}"'.encode() in file.read(SAID_WITHIN)
    except (OSError, ValueError):
        return False


def _with_activations(layer: LayerChoice, activations: Activations | None) -> LayerChoice:
    if activations is not None and not isinstance(activations, Activations):
        raise SettingError(f"layer {layer.name!r}: activations: {shown(activations)} is no Activations")
    given = layer.model_copy(update={"activations": activations})
    try:
        given.check_activations()
    except ValueError as error:
        raise SettingError(str(error)) from error
    return given


def _with_layer_name(parameter: str, new: Callable[[str], str]) -> str:
    """A parameter of a layer that is called otherwise."""
    if is_weight(parameter):
        return weight_name(new(layer_name(parameter)))
    return new(parameter)


def _no_json(where: str, error: ValueError) -> str:
    return (
        f"{where}: not JSON ({error}); a plan is a JSON file that `mpq plan` writes, or that `mpq inspect CONTAINER "
        "--plan` takes out of a container"
    )


def _one_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@public
class Difference(Strict):
    """One layer of two plans.

    Attributes:
        name: The layer's name.
        before: What the first plan has; None where it lacks the layer.
        after: What the second plan has; None where it lacks the layer.
    """

    name: str
    before: LayerChoice | None
    after: LayerChoice | None


def json_schema() -> dict[str, Any]:
    """The schema of plan files: the model's, and their checksum."""
    schema = Plan.model_json_schema()
    schema["properties"]["checksum"] = {
        "description": "CRC-32 of the rest, as checksum.py takes it; a plan that was edited by hand goes without.",
        "pattern": "^[0-9a-f]{8}$",
        "type": "string",
    }
    return schema


if __name__ == "__main__":  # how plan.schema.json is made
    print(json.dumps(json_schema(), indent=2))
