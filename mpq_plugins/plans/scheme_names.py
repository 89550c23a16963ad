"""Schemes by name: those of this package and of any other, and how files hold them."""

import json
from dataclasses import is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, cast

from pydantic import Discriminator, GetCoreSchemaHandler, SerializationInfo, Tag, TypeAdapter, ValidationInfo
from pydantic_core import PydanticCustomError, core_schema

from ..common.registry import load, names, owner
from ..errors import PluginError
from .affine import Affine
from .codebook import Codebook
from .entropy_coded import EntropyCoded
from .ggml import GGML
from .minifloat import Minifloat
from .piecewise import Piecewise
from .scheme import Scheme
from .schemes import SCHEMES

GROUP = "schemes"
ADDED: dict[str, Any] = {"scale_dtype": "float32", "stochastic": None}
"""Fields that schemes had not always, and what stands for them in a file without."""


def scheme_names() -> tuple[str, ...]:
    """The names of all schemes that are installed, this package's first; nothing is imported."""
    return (*SCHEMES, *(name for name in names(GROUP) if name not in SCHEMES))


@cache
def scheme_class(name: str) -> type[Any]:
    """The scheme of that name, a frozen dataclass that answers what `Scheme` asks; its fields are its settings.

    Raises PluginError for a name that is not installed, listing those that are, and for one that is broken.
    """
    if name in SCHEMES:
        return SCHEMES[name]
    loaded: Any = load(GROUP, name)
    if not (isinstance(loaded, type) and is_dataclass(loaded) and getattr(loaded, "name", None) == name):
        plugin = owner(GROUP, name)
        assert plugin is not None
        raise PluginError(
            f"{GROUP}: {name!r} of {plugin.distribution}, {plugin.target}, should be a frozen dataclass whose name is "
            f"{name!r}, as its entry point says"
        )
    return loaded


def _installed(name: object) -> type[Any]:
    """The scheme of a name in a file, broken ones raising PluginError."""
    try:
        if isinstance(name, str):
            return scheme_class(name)
    except PluginError:
        if name in names(GROUP):
            raise
    raise _unknown()


def _unknown() -> PydanticCustomError:
    *first, last = scheme_names()
    return PydanticCustomError("scheme", f"is not allowed; a scheme named {', '.join(first)} or {last}")


def _validated(value: Any, ours: Any, info: ValidationInfo) -> Any:
    name = value.get("name", Affine.name) if isinstance(value, dict) else getattr(value, "name", None)
    if name in tuple(SCHEMES):
        return ours(value)
    kind = _installed(name)
    if type(value) is kind:
        return value
    settings = {key: inner for key, inner in value.items() if key != "name"} if isinstance(value, dict) else value
    adapter = _adapter(cast(Any, kind))
    return adapter.validate_json(json.dumps(settings)) if info.mode == "json" else adapter.validate_python(settings)


def _serialized(value: Any, ours: Any, info: SerializationInfo) -> Any:
    if type(value) in SCHEMES.values():
        written = ours(value)
        return {key: inner for key, inner in written.items() if key not in ADDED or inner != ADDED[key]}
    mode: Literal["json", "python"] = "json" if info.mode == "json" else "python"
    fields = _adapter(cast(Any, type(value))).dump_python(value, mode=mode, exclude_none=info.exclude_none)
    return {"name": value.name, **fields}


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


_Ours = Annotated[
    Annotated[Affine, Tag("affine")]
    | Annotated[Piecewise, Tag("piecewise")]
    | Annotated[Codebook, Tag("codebook")]
    | Annotated[EntropyCoded, Tag("entropy_coded")]
    | Annotated[Minifloat, Tag("minifloat")]
    | Annotated[GGML, Tag("ggml")],
    Discriminator(
        lambda value: value.get("name", "affine") if isinstance(value, dict) else getattr(value, "name", None)
    ),
]


class _ByName:
    """How pydantic reads and writes a scheme; the schema of a file lists those of this package."""

    @staticmethod
    def __get_pydantic_core_schema__(_: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        ours = handler.generate_schema(_Ours)
        written = core_schema.wrap_serializer_function_ser_schema(_serialized, info_arg=True, schema=ours)
        return core_schema.with_info_wrap_validator_function(_validated, ours, serialization=written)


NamedScheme = Annotated[Scheme, _ByName]
"""A scheme in a file, told apart by its name; affine where it has none."""
