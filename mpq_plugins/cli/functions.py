"""`package.module:function` and `file.py:function` on the command line, as what they name."""

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from ..common.files import exists
from ..common.outsiders import contained, outsiders
from ..common.text import did_you_mean
from ..errors import SourceError

DOTTED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
IN_FILE = re.compile(r"(.+\.py):([A-Za-z_]\w*)")


def names_function(text: str) -> bool:
    """Whether the words name a function rather than a file that is there."""
    return bool(DOTTED.fullmatch(text) or IN_FILE.fullmatch(text)) and not exists(Path(text))


def function_file(text: str) -> Path | None:
    """The file here in which a function is looked for; None where the words name none."""
    if (in_file := IN_FILE.fullmatch(text)) is not None:
        return Path(in_file[1])
    return Path(*text.partition(":")[0].split(".")).with_suffix(".py") if DOTTED.fullmatch(text) else None


def named_function(text: str) -> Callable[..., Any]:
    """What the words name.

    Args:
        text: `package.module:function` as Python imports it, or `file.py:function`.

    Raises:
        SourceError: The words name no function, or it cannot be imported.
    """
    module, folder, name = _place(text)
    with outsiders(lambda said: SourceError(f"{text}: the function cannot be found ({said})")):
        with _importing_from(Path.cwd(), folder):
            imported = importlib.import_module(module)
        _check_file(imported, text)
        _travels(imported, folder)
        if not hasattr(imported, name):
            near = did_you_mean(name, (known for known in vars(imported) if not known.startswith("_")))
            raise SourceError(f"{text}: the function cannot be found: {module} has no {name!r}{near}")
        function = getattr(imported, name)
    if not callable(function):
        raise SourceError(f"{text}: is a {type(function).__name__}; a function is needed")
    return contained(function)


def _place(text: str) -> tuple[str, Path, str]:
    """The module, the folder that it is imported from, and the function's name."""
    in_file = IN_FILE.fullmatch(text)
    if in_file is None or exists(Path(text)):
        if not DOTTED.fullmatch(text):
            raise SourceError(
                f"{text}: names no function; write package.module:function as Python imports it, or file.py:function"
            )
        module, _, name = text.partition(":")
        return module, Path.cwd(), name
    path, name = Path(in_file[1]), in_file[2]
    if not path.is_file():
        raise SourceError(f"{text}: there is no file {path}; name the file of the function, or package.module:{name}")
    here = path.resolve()
    folder = here.parent
    while (folder / "__init__.py").is_file() and folder.parent != folder:  # a package is imported from beside it
        folder = folder.parent
    parts = here.relative_to(folder).with_suffix("").parts
    if not all(part.isidentifier() for part in parts):
        raise SourceError(f"{text}: {path.name} is no name that Python imports; rename it to letters and underscores")
    return ".".join(parts), folder, name


def _travels(module: ModuleType, folder: Path) -> None:
    """Have dask's workers sent the code of a file of the user's, which they could not import; of packages, its name."""
    file = Path(getattr(module, "__file__", None) or os.devnull).resolve()
    if file.parent != folder.resolve() or module.__name__.partition(".")[0] == __package__.partition(".")[0]:
        return
    with suppress(ImportError):  # which comes with dask
        import cloudpickle

        cloudpickle.register_pickle_by_value(module)


def _check_file(module: Any, text: str) -> None:
    """Refuse another module of the same name. Raises SourceError."""
    in_file = IN_FILE.fullmatch(text)
    found = getattr(module, "__file__", None)
    if in_file is not None and (found is None or Path(found).resolve() != Path(in_file[1]).resolve()):
        raise SourceError(
            f"{text}: Python finds another module {module.__name__!r} ({found or 'built in'}); rename {in_file[1]}"
        )


@contextmanager
def _importing_from(*folders: Path) -> Iterator[None]:
    """As `python -m` does, so that a user's own file is found, and what it imports beside it."""
    added = list(dict.fromkeys(map(str, folders)))
    sys.path[:0] = reversed(added)
    try:
        yield
    finally:
        for folder in added:
            with suppress(ValueError):  # what was imported may have changed the path, too
                sys.path.remove(folder)
