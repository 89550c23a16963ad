"""Packages that are not always installed: which extra brings each, and how it is installed."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

EXTRAS: Mapping[str, str] = {
    "brevitas": "brevitas", "compressed_tensors": "compressed-tensors", "distributed": "dask", "gguf": "gguf",
    "matplotlib": "report", "neural_compressor": "inc", "torchao": "torchao", "xllamacpp": "gguf",
}  # fmt: skip
"""Package as it is imported -> the extra of this project that installs it."""

ADAPTERS: Mapping[str, tuple[str, str]] = {
    "brevitas": ("brevitas", "brevitas"), "inc": ("neural_compressor", "inc"),
    "compressed_tensors": ("compressed_tensors", "compressed-tensors"), "gguf": ("gguf", "gguf"),
    "inc_classic": ("neural_compressor", "inc-classic"), "pt2e": ("torchao", "torchao"),
    "torchao": ("torchao", "torchao"),
}  # fmt: skip
"""Adapter or exporter of this project -> the package that it needs, and the extra that installs that."""

FIRST_NEW = (3, 8)  # of Neural Compressor; until then its classic API was part of it


def how_to_install(extra: str) -> str:
    """The commands that install an extra, from a checkout and from an index."""
    return f"pip install -c constraints.txt -e '.[{extra}]' in a checkout, or pip install 'mpq-plugins[{extra}]'"


def missing_for(adapter: str) -> str:
    """Say why an adapter or exporter of this project cannot be used here, importing nothing; empty where it can."""
    if adapter not in ADAPTERS:
        return ""
    package, extra = ADAPTERS[adapter]
    if find_spec(package) is None:
        return f"{package} is not installed: {how_to_install(extra)}"
    if package == "neural_compressor" and (extra == "inc-classic") == _is_new():
        return f"the other API of Neural Compressor is installed: {how_to_install(extra)}, in another environment"
    return ""


def _is_new() -> bool:
    """Whether Neural Compressor is of the releases that have no classic API."""
    for distribution in ("neural-compressor-pt", "neural-compressor"):
        try:
            major, minor, *_ = version(distribution).split(".")
        except (PackageNotFoundError, ValueError):
            continue
        return (int(major), int(minor)) >= FIRST_NEW
    return True
