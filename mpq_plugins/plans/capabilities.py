"""What a backend can run, and what has to change in a plan for it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ..common.public import public
from ..errors import SettingError
from .activations import Dynamic
from .affine import Symmetry
from .granular import Granularity
from .storage import Storage

Policy = Literal["up", "nearest", "error"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


@public
@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a backend can run without changing a plan's meaning. Layers left at 16 or 32 bits are always possible.

    Attributes:
        backend: Its name.
        bits: Of weights.
        kinds: Of layers.
        schemes: Their names, or those of types, as `nvfp4`.
        symmetric: Which of asymmetric (False), symmetric (True) and full-range symmetric codes ("full").
        granularities: What a scale may belong to.
        group_sizes: Inputs that a group may have; None where any number will do.
        parts: Whether channels of one layer may differ in bits.
        float_parts: Whether some channels of a layer may stay in floating point.
        activation_bits: Of activations; None among them is floating point.
        activation_kinds: Kinds beside quantized activations, where they differ.
        activation_symmetric: What symmetric is beside quantized activations, where it differs.
        input_dynamic: Which ranges quantized inputs may have: None is a static one, `per_tensor` and `per_token` are of
            each input as it comes.
        input_symmetric: Which of asymmetric (False) and symmetric (True) codes quantized inputs may have.
        storage: How the backend keeps quantized weights; None where it does not say.
        stochastic: Whether codes that are rounded stochastically are kept; False of a backend that rounds weights by
            itself, to nearest.

    Raises:
        SettingError: Nothing is left.

    Examples:
        >>> import mpq_plugins as mpq
        >>> mpq.Capabilities(backend="chip", bits=(4, 8), kinds=("linear",)).beside(None).kinds
        ('linear',)
    """

    backend: str
    bits: tuple[int, ...]
    kinds: tuple[str, ...]
    schemes: tuple[str, ...] = ("affine",)
    symmetric: tuple[Symmetry, ...] = (False, True)
    granularities: tuple[Granularity, ...] = ("per_tensor", "per_channel")
    group_sizes: tuple[int, ...] | None = None
    parts: bool = False
    float_parts: bool = False
    activation_bits: tuple[int | None, ...] = (None,)
    activation_kinds: tuple[str, ...] | None = None
    activation_symmetric: tuple[Symmetry, ...] | None = None
    input_dynamic: tuple[Dynamic | None, ...] = (None,)
    input_symmetric: tuple[bool, ...] = (False,)
    storage: Storage | None = None
    stochastic: bool = True

    def __post_init__(self) -> None:
        needed = ("bits", "kinds", "symmetric", "activation_bits", "input_dynamic", "input_symmetric")
        if not all(getattr(self, name) for name in needed):
            raise SettingError(f"{self.backend}: {', '.join(needed[:-1])} and {needed[-1]} need one value or more")
        if not {"per_tensor", "per_channel"} & {*self.granularities}:
            raise SettingError(f"{self.backend}: granularities need per_tensor or per_channel")
        if self.group_sizes == ():
            raise SettingError(f"{self.backend}: group_sizes need one value or more, or None for any")

    def beside(self, activation_bits: int | None) -> "Capabilities":
        """Give what is left of it for weights beside activations of these bits.

        Args:
            activation_bits: Bits of the activations; None for floating point.

        Returns:
            The capabilities there.
        """
        if activation_bits is None:
            return self
        return replace(
            self,
            kinds=self.activation_kinds or self.kinds,
            symmetric=self.activation_symmetric or self.symmetric,
        )


@public
@dataclass(frozen=True)
class Change:
    """One layer (or `activations`) that a backend cannot take as planned: what it was, what it becomes, and why.

    Attributes:
        layer: Its name.
        before: What the plan has, in words.
        after: What the backend gets, in words.
        why: What the backend does not have.
        cost: Bits of the whole layer, in total, that the change adds (negative: saves).
    """

    layer: str
    before: str
    after: str
    why: str
    cost: int


def nearest(bits: int, allowed: Sequence[int], policy: Policy, what: str, backend: str) -> int:
    """The width of `allowed` that comes after `bits`, or nearest to it. Raises SettingError where nothing is above."""
    above = [b for b in allowed if b > bits]
    if policy != "up":  # an error lists every layer, so here too each needs a width to go to
        return min(allowed, key=lambda b: (abs(b - bits), -b))
    if not above:
        raise SettingError(f'{what}, and {backend} has nothing above, only {listed(allowed)}. Use policy="nearest".')
    return min(above)


def listed(allowed: Sequence[int | None]) -> str:
    """Widths in words; None is floating point."""
    return ", ".join("floating point" if b is None else str(b) for b in allowed)
