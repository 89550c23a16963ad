"""Types by name: what a layer can be stored as, each with one scheme, one width and its true cost."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..common.checks import listed, shown
from ..common.public import public
from ..common.text import did_you_mean
from ..errors import SettingError
from .affine import Affine
from .ggml import GGML
from .ggml import TYPES as GGML_TYPES
from .granular import inputs_of
from .layers import LayerChoice
from .minifloat import MINIFLOATS, Minifloat
from .scheme import Scheme
from .size import layer_size
from .type_names import GROUP_SIZES, type_name

INTEGER_WIDTHS = range(2, 9)
GGUF = ("q2_k", "q3_k", "q4_0", "q4_k", "iq4_xs", "iq4_nl", "q4_1", "q5_0", "q5_k", "q5_1", "q6_k", "q8_0")
"""What llama.cpp's own mixtures are made of."""


@public
@dataclass(frozen=True)
class NamedType:
    """A type that a layer can be stored as.

    Attributes:
        name: How plans, tables and the command line call it.
        scheme: How weights become its codes.
        bits: The width of a code.

    Examples:
        >>> import mpq_plugins as mpq
        >>> int4 = mpq.named_type("int4_g32")
        >>> int4.bits, int4.bits_a_weight((64, 128))
        (4, 4.5)
    """

    name: str
    scheme: Scheme
    bits: int

    def fits(self, shape: Sequence[int], channel_axis: int = 0) -> bool:
        """Tell whether a weight of this shape can have the type: its inputs divide into the type's groups.

        Args:
            shape: The weight's shape.
            channel_axis: Its axis of output channels.

        Returns:
            Whether it can.
        """
        own = getattr(self.scheme, "fits", None)
        if own is not None:
            return bool(own(shape, channel_axis))
        if self.scheme.group_size is None:
            return True
        return inputs_of(shape, channel_axis) % self.scheme.group_size == 0

    def bits_a_weight(self, shape: Sequence[int]) -> float:
        """Count what a weight costs, with its share of scales and all else that a file must hold.

        Args:
            shape: The shape of a weight, output channels first.

        Returns:
            Bits of each weight.
        """
        choice = LayerChoice.model_construct(
            name="", kind="linear", shape=tuple(shape), channel_axis=0, numel=math.prod(shape), bits=self.bits,
            scheme=self.scheme,
        )  # fmt: skip
        return layer_size(choice).total / max(1, choice.numel)


def _integer(bits: int, group_size: int | None) -> NamedType:
    """Full-range symmetric codes with 16-bit scales, as GPTQ, compressed-tensors and ggml keep them."""
    if group_size is None:
        scheme = Affine(symmetric="full", granularity="per_channel", scale_dtype="float16")
        return _named(scheme, bits)
    scheme = Affine(symmetric="full", granularity="per_group", group_size=group_size, scale_dtype="float16")
    return _named(scheme, bits)


def _named(scheme: Scheme, bits: int) -> NamedType:
    name = type_name(scheme, bits)
    assert name is not None, "a type that has a name"
    return NamedType(name, scheme, bits)


def _ggml(name: str) -> NamedType:
    """A type of ggml's; those that OCP has too, and ggml rounds otherwise, are called after ggml."""
    scheme = GGML(type=name)  # type: ignore[arg-type]  # one of them
    return _named(scheme, scheme.bits)


def _minifloat(name: str) -> NamedType:
    scheme = Minifloat(format=name)  # type: ignore[arg-type]  # one of them
    return _named(scheme, scheme.bits)


_INTEGERS = tuple(_integer(bits, size) for size in (None, *GROUP_SIZES) for bits in INTEGER_WIDTHS)
_FAMILIES: dict[str, tuple[NamedType, ...]] = {
    "gguf": tuple(_ggml(name) for name in GGUF),
    "int": tuple(_integer(bits, 32) for bits in INTEGER_WIDTHS),
    "mx": tuple(_minifloat(name) for name in MINIFLOATS if name.startswith("mx")),
    "fp8": tuple(_minifloat(name) for name in MINIFLOATS if name.startswith("fp8")),
}
_OTHERS = (_minifloat("nvfp4"), *(_ggml(name) for name in GGML_TYPES if name not in GGUF))
_TYPES = {kind.name: kind for kinds in (_INTEGERS, *_FAMILIES.values(), _OTHERS) for kind in kinds}


def named_type(name: str) -> NamedType:
    """Look up a type.

    Args:
        name: `int4` (a scale for each channel), `int4_g32` (a scale for every 32 inputs; 64 and 128 too), `mxfp4` ...

    Returns:
        The type.

    Raises:
        SettingError: There is no such type.

    Examples:
        >>> import mpq_plugins as mpq
        >>> mpq.named_type("mxfp4").scheme
        Minifloat(name='minifloat', format='mxfp4')
    """
    if not isinstance(name, str):
        raise SettingError(f"type: {shown(name)} is not allowed; the name of one, as int4_g32")
    if name not in _TYPES:
        raise SettingError(
            f"type: {shown(name)} is not allowed; {', '.join(_TYPES)}{did_you_mean(name, tuple(_TYPES))}"
        )
    return _TYPES[name]


def type_names() -> tuple[str, ...]:
    """The names of all types."""
    return tuple(_TYPES)


def families() -> tuple[str, ...]:
    """The names that stand for several types."""
    return tuple(_FAMILIES)


def _family(word: object) -> tuple[NamedType, ...]:
    return _FAMILIES.get(word, ()) if isinstance(word, str) else ()


def types_of(words: "Iterable[str | NamedType]") -> tuple[NamedType, ...]:
    """The types that these words mean, a family's all of them, each once. Raises SettingError for none, or another."""
    chosen: dict[str, NamedType] = {}
    for word in listed("types", words, "a list of names"):
        for kind in (word,) if isinstance(word, NamedType) else _family(word) or (named_type(word),):
            if chosen.setdefault(kind.name, kind) != kind:
                raise SettingError(f"types: {kind.name!r} is the name of two")
    if not chosen:
        raise SettingError(f"types: none given; some of {', '.join(_TYPES)}, or {', '.join(_FAMILIES)}")
    return tuple(chosen.values())
