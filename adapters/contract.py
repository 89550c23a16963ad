"""What an adapter offers: a module or an object that an entry point of `mpq_plugins.adapters` names.

    check(plan, model)                            # refuses, naming layers and remedy
    quantized = apply(model, plan, batches)       # a quantized copy in the backend's own form
    verify(quantized, plan, model, batch=batch)   # what it holds, read back and compared with the plan

What else a backend can do stays beside these, under names of its own. A plugin that lacks any of them is refused when
it is loaded (common/registry.py).

An exporter, of `mpq_plugins.exporters`, writes a checkpoint that another stack loads, and needs no model in memory:

    check(plan, source)                           # source: the float checkpoint's path
    exported = export(source, plan, output)       # streamed, tensor by tensor
    verify(exported.path, plan, source)           # read back from the files

A config writer, of `mpq_plugins.configs`, gives the text by which another quantizer takes the plan's widths:

    text = config(plan, source)
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from mpq_plugins.common.progress import Progress
from mpq_plugins.common.public import public
from mpq_plugins.models.input_ranges import InputRange
from mpq_plugins.plans.capabilities import Capabilities
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.plan import Plan


@public
@dataclass(frozen=True)
class LayerCheck:
    """One planned layer as it was found in a quantized model.

    Attributes:
        layer: Its first name in the plan.
        bits: (width, output channels) pairs, one a part.
        stored: What holds its weight there, in the backend's words: a class, a dtype or a quantizer.
        activation_bits: Bits of its input; None for floating point.
        ties: Codes that lie one off the plan's, for weights in the middle between two levels.
        input_range: The static range of its input; None where there is none, or the backend does not tell.
    """

    layer: str
    bits: tuple[tuple[int, int], ...]
    stored: str
    activation_bits: int | None = None
    ties: int = 0
    input_range: InputRange | None = None

    @classmethod
    def of(
        cls,
        layer: LayerChoice,
        stored: str,
        activation_bits: int | None = None,
        ties: int = 0,
        input_range: InputRange | None = None,
    ) -> "LayerCheck":
        """Make the check of a layer that holds its plan's widths.

        Args:
            layer: The plan's choice for it.
            stored: What holds its weight.
            activation_bits: Bits of its input; None for floating point.
            ties: Codes that lie one off the plan's.
            input_range: The static range of its input.

        Returns:
            The check, with the layer's name and widths.
        """
        return cls(layer.name, layer.widths, stored, activation_bits, ties, input_range)


def class_name(module: object) -> str:
    """A module's class with where it is from, as `LayerCheck.stored` names it."""
    return f"{type(module).__module__}.{type(module).__name__}"


@public
class Adapter(Protocol):
    """What a backend offers: three functions and what it can run.

    A batch is a tensor, or a tuple or mapping of the model's arguments. Errors are MPQError's family: SettingError for
    a plan or argument that the backend cannot run, MismatchError for a model that it cannot run or that the plan was
    not made for, VerifyError for a model that does not hold the plan.
    """

    @property
    def CAPABILITIES(self) -> Capabilities:  # noqa: N802  # a constant of a module
        """What the backend runs without changing a plan's meaning; `legalise` goes by it."""
        ...

    def check(self, plan: Plan, model: nn.Module) -> None:
        """Check that the backend can run the plan on the model.

        Args:
            plan: The plan.
            model: The float model; it is not changed.

        Raises:
            SettingError: The backend cannot run the plan. The message names layers and the remedy.
            MismatchError: The plan is another model's, or the backend cannot run the model.
        """
        ...

    def apply(self, model: nn.Module, plan: Plan, batches: Iterable[Any] = ()) -> Any:
        """Make a quantized copy of the model.

        Args:
            model: The float model; it is not changed.
            plan: The plan.
            batches: Inputs, by which the ranges of quantized activations are set and the model is exported. A backend
                that needs none leaves them alone.

        Returns:
            The copy, in the backend's own form.

        Raises:
            SettingError: As `check`; or inputs are needed, and there are none.
            MismatchError: As `check`.
        """
        ...

    def verify(self, quantized: Any, plan: Plan, model: nn.Module, *, batch: Any = None) -> tuple[LayerCheck, ...]:
        """Compare what a quantized model holds with what the plan makes of the float model.

        Args:
            quantized: The quantized model.
            plan: The plan.
            model: The float model.
            batch: Inputs on which the outputs must be those of `mpq_plugins.apply` too, within what the backend's
                arithmetic comes to.

        Returns:
            A check for each planned layer.

        Raises:
            VerifyError: The model does not hold the plan. The message lists what is wrong.
            MismatchError: The plan is another model's.
        """
        ...


@public
@dataclass(frozen=True)
class Exported:
    """What an exporter wrote.

    Attributes:
        path: The file or directory.
        layers: Planned layers that are stored as codes.
        layer_bytes: What their codes, scales and zero points take.
        total_bytes: What all tensors take, layers in float among them.
        notes: What a careful user wants to know, a sentence each.

    Examples:
        >>> import mpq_plugins as mpq
        >>> from pathlib import Path
        >>> mpq.Exported(Path("model-mlx"), layers=1, layer_bytes=40, total_bytes=104).notes
        ()
    """

    path: Path
    layers: int
    layer_bytes: int
    total_bytes: int
    notes: tuple[str, ...] = ()


@public
class Exporter(Protocol):
    """What writes a plan as a checkpoint that another stack loads: codes of the plan, not of that stack's rounding.

    Tensors are read, quantized and written one at a time, so that memory follows the largest layer and not the model.
    An exporter whose files several runtimes load, not all of which take everything, also has `RUNTIMES`, a mapping from
    a runtime's name to its Capabilities, the default one first; its `check` and `export` then take `runtime=`. Errors
    are MPQError's family, as an Adapter's.
    """

    @property
    def CAPABILITIES(self) -> Capabilities:  # noqa: N802  # a constant of a module
        """What the format holds without changing a plan's meaning; `legalise` goes by it."""
        ...

    def check(self, plan: Plan, source: Path) -> None:
        """Check that the plan of this checkpoint can be exported.

        Args:
            plan: The plan.
            source: The float checkpoint.

        Raises:
            SettingError: The format cannot hold the plan. The message names layers and the remedy.
            MismatchError: The plan is another model's.
            SourceError: The checkpoint cannot be read, or lacks what the format needs of it.
        """
        ...

    def export(self, source: Path, plan: Plan, output: Path, *, progress: Progress | None = None) -> Exported:
        """Write the checkpoint with the plan's codes; an interruption leaves nothing half written.

        Args:
            source: The float checkpoint; it is not changed.
            plan: The plan.
            output: The file or new directory to write.
            progress: Called with a layer's name, weights done and weights in all.

        Returns:
            What was written.

        Raises:
            SettingError: As `check`; or the output cannot be there.
            MismatchError: As `check`.
            SourceError: As `check`; or writing fails.
        """
        ...

    def verify(
        self, exported: Path, plan: Plan, source: Path, *, progress: Progress | None = None
    ) -> tuple[LayerCheck, ...]:
        """Read the written files back and compare every code, scale and float tensor with the plan's of the checkpoint.

        Args:
            exported: What `export` wrote.
            plan: The plan.
            source: The float checkpoint.
            progress: Called with a layer's name, weights done and weights in all.

        Returns:
            A check for each planned layer that is stored as codes.

        Raises:
            VerifyError: The files do not hold the plan. The message lists what is wrong.
            MismatchError: The plan is another model's.
            SourceError: Files cannot be read.
        """
        ...


@public
class ConfigWriter(Protocol):
    """What writes a plan as another quantizer's configuration: the plan's widths, that quantizer's own rounding."""

    @property
    def CAPABILITIES(self) -> Capabilities:  # noqa: N802  # a constant of a module
        """What the configuration can say; `legalise` goes by it."""
        ...

    def config(self, plan: Plan, source: Path) -> str:
        """Make the configuration, which names every layer, those left in float among them.

        Args:
            plan: The plan.
            source: The float checkpoint, by which names are checked.

        Returns:
            The text of a file.

        Raises:
            SettingError: The configuration cannot say the plan. The message names layers and the remedy.
            MismatchError: The plan is another model's.
            SourceError: The checkpoint cannot be read.
        """
        ...
