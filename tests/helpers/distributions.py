"""Distributions of others, as an installer leaves them: a module, and a folder that says what it declares."""

from collections.abc import Mapping
from pathlib import Path


def install(site: Path, distribution: str, code: str, entry_points: Mapping[str, Mapping[str, str]]) -> str:
    """Put a distribution of one module into `site`, a folder on the path; returns the module's name.

    entry_points: group (`schemes`) -> name -> what of the module it is, or the module itself where that is empty.
    """
    module = distribution.replace("-", "_")
    (site / f"{module}.py").write_text(code)
    folder = site / f"{module}-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = []
    for group, names in entry_points.items():
        lines.append(f"[mpq_plugins.{group}]")
        lines += [f"{name} = {module}:{what}" if what else f"{name} = {module}" for name, what in names.items()]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return module
