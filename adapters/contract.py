"""What an adapter offers: a module or an object that an entry point of `mpq_plugins.adapters` names.

    check(plan, model)                            # refuses, naming layers and remedy
    quantized = apply(model, plan, batches)       # a quantized copy in the backend's own form
    verify(quantized, plan, model, batch=batch)   # what it holds, read back and compared with the plan

What else a backend can do stays beside these, under names of its own. A plugin that lacks any of them is refused when
it is loaded (common/registry.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from mpq_plugins.common.public import public
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.legalise import Capabilities
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
    """

    layer: str
    bits: tuple[tuple[int, int], ...]
    stored: str
    activation_bits: int | None = None
    ties: int = 0

    @classmethod
    def of(cls, layer: LayerChoice, stored: str, activation_bits: int | None = None, ties: int = 0) -> "LayerCheck":
        """Make the check of a layer that holds its plan's widths.

        Args:
            layer: The plan's choice for it.
            stored: What holds its weight.
            activation_bits: Bits of its input; None for floating point.
            ties: Codes that lie one off the plan's.

        Returns:
            The check, with the layer's name and widths.
        """
        return cls(layer.name, layer.widths, stored, activation_bits, ties)


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
