"""Backends by name, whichever group they are of: adapters, exporters, writers of configurations."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..common import registry
from ..common.checks import shown
from ..common.text import did_you_mean
from ..errors import PluginError, SettingError
from .types import Known

if TYPE_CHECKING:  # `mpq --help` should not wait for it
    from ..plans.capabilities import Capabilities


def backend_names(*groups: str) -> Known:
    """A name of any of these groups; one that is not installed is refused where it is loaded."""
    return Known(lambda: sorted({name for group in groups for name in registry.names(group)}), checked=False)


def load_backend(name: str) -> tuple[str, Any]:
    """The group of a backend, the first that has the name, and what its entry point names. Raises PluginError."""
    known = {known: group for group in reversed(registry.BACKENDS) for known in registry.names(group)}
    group = known.get(name, registry.BACKENDS[0])
    try:
        return group, registry.load(group, name)
    except PluginError as error:
        if name in known:
            raise
        there = [*dict.fromkeys(known for group in registry.BACKENDS for known in registry.names(group))]
        said = f"backend: {shown(name)} is not installed; there are {', '.join(there)}{nearest(name, there)}"
        raise PluginError(said) from error


READ_BY = {
    "vllm": "compressed_tensors", "transformers": "compressed_tensors", "llama.cpp": "gguf", "llamacpp": "gguf",
    "ollama": "gguf", "mlx_lm": "mlx", "mlx-lm": "mlx", "gptqmodel": "gptq", "autogptq": "gptq", "exllama": "gptq",
    "pytorch": "fx", "neural_compressor": "inc",
}  # fmt: skip
"""What runs a model -> the backend whose files or modules it runs."""


def nearest(name: str, known: Iterable[str]) -> str:
    """How a refusal of a backend's name ends: with what it is called here, or the name that it is nearest to."""
    ours = READ_BY.get(name.lower())
    return f". {name} runs what {ours} makes" if ours is not None else did_you_mean(name, known)


def capabilities_of(group: str, name: str, backend: Any, runtime: str | None = None) -> "Capabilities":
    """What a backend runs, or what one of an exporter's runtimes loads.

    Raises PluginError where it does not say, SettingError for a runtime that it does not know.
    """
    from ..plans.capabilities import Capabilities

    stated = getattr(backend, "CAPABILITIES", None)
    if runtime is not None:
        runtimes = getattr(backend, "RUNTIMES", {})
        if runtime not in runtimes:
            known = ", ".join(runtimes) or f"{name} has no choice of them, so leave it out"
            raise SettingError(f"runtime: {shown(runtime)} is not allowed; {known}")
        stated = runtimes[runtime]
    if not isinstance(stated, Capabilities):
        raise PluginError(f"{group}: {name!r} states no CAPABILITIES, so that no plan can be checked for it")
    return stated
