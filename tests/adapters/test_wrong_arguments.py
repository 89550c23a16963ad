"""Every function of an adapter's face says of another kind of value, in one line, that it is none of its own."""

import inspect
from importlib.metadata import entry_points
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from mpq_plugins import MPQError, Uniform, measure
from mpq_plugins.common import registry

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

FACES = [
    (group, entry.name) for group in ("adapters", "exporters") for entry in entry_points(group=f"mpq_plugins.{group}")
]
NET = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
PLAN = Uniform(bits=4)(measure(NET))
BATCHES = [torch.randn(16, 8, generator=torch.Generator().manual_seed(0))]
RIGHT: dict[str, Any] = {
    "model": NET, "source": Path("nowhere"), "plan": PLAN, "quantized": NET, "batches": BATCHES, "original": NET,
    "path": "file.bin", "output": Path("made"), "exported": Path("made"), "plans": [PLAN], "evaluate": len,
}  # fmt: skip
WRONG = {"an integer": 3, "a module": NET, "a plan": PLAN, "a list": [3], "a mapping": {"a": 3}, "an object": object()}
LOOKED_INTO = ("act_order", "seed", "per_channel", "example_inputs", "eval_args", "run_args")  # by their backends


def functions(face: ModuleType) -> list[FunctionType]:
    """Those with a small name, of which tables of several are made of dataclasses."""
    named = [getattr(face, name) for name in dir(face) if not name.startswith("_")]
    return [value for value in named if isinstance(value, FunctionType)]


@pytest.mark.parametrize(("group", "name"), FACES, ids=[name for _, name in FACES])
def test_another_kind_of_value_is_an_error_of_ours(
    group: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        face: Any = registry.load(group, name)
    except MPQError as error:
        pytest.skip(str(error))
    tried = 0
    for function in functions(face):
        parameters = inspect.signature(function).parameters.values()
        needed = {one.name for one in parameters if one.default is one.empty and one.kind is not one.VAR_KEYWORD}
        for argument in (one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)):
            if not needed <= {*RIGHT, argument} or argument in LOOKED_INTO:
                continue
            for kind, value in WRONG.items():
                if argument == "progress" and callable(value):
                    continue
                given = {key: RIGHT[key] for key in needed - {argument}} | {argument: value}
                tried += 1
                try:
                    function(**given)
                except MPQError as error:
                    said = str(error)
                    assert "\n" not in said
                except Exception as error:
                    said = f"{type(error).__name__}: {error}"
                    raise AssertionError(f"{name}.{function.__name__}({argument}={kind}): {said}") from error
    assert tried
