"""A source is looked at once, and handed on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpq_plugins import Uniform, measure
from mpq_plugins.checkpoints import checkpoint as checkpoints
from mpq_plugins.cli.sources import resolve_source
from mpq_plugins.plans import table_file
from tests.conftest import Ran
from tests.helpers.nets import conv_net

HERE = "tests.cli.test_sources"
made: list[int] = []


def net() -> nn.Module:
    made.append(1)
    return conv_net().eval()


def batches() -> list[Tensor]:
    return [torch.randn(4, 3, 8, 8)]


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], list[Any]]:
    def counted(owner: Any, name: str) -> list[Any]:
        """What a function was called with first, each time."""
        calls: list[Any] = []
        whole = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            calls.append(arguments[0])
            return whole(*arguments, **named)

        monkeypatch.setattr(owner, name, call)
        return calls

    return counted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.save(conv_net().state_dict(), tmp_path / "net.pt")
    measure(conv_net()).save(tmp_path / "net.mpqt")
    Uniform(bits=4)(measure(tmp_path / "net.pt")).save(tmp_path / "plan.json")
    made.clear()
    return tmp_path


@pytest.mark.parametrize("more", [(), ("--model", f"{HERE}:net", "--calibrate", f"{HERE}:batches")])
def test_apply_loads_a_torch_checkpoint_once(
    mpq: Callable[..., Ran], folder: Path, count: Callable[[Any, str], list[Any]], more: tuple[str, ...]
) -> None:
    loads, choices = count(torch, "load"), count(checkpoints, "chosen_state_dict")
    ran = mpq("apply", folder / "net.pt", folder / "plan.json", *more, "-o", folder / "out.pt")
    assert ran.code == 0, ran.err
    assert loads == [folder / "net.pt"]
    assert len(choices) == 1
    assert len(made) == len(more) // 4


@pytest.mark.parametrize("command", ["plan", "sweep", "pareto"])
@pytest.mark.parametrize("name", ["net.mpqt", "net.pt"])
def test_whether_a_source_is_a_table_is_asked_once(
    mpq: Callable[..., Ran], folder: Path, count: Callable[[Any, str], list[Any]], command: str, name: str
) -> None:
    asked = count(table_file, "is_table")
    more = ("--budgets", 4, "--bits", "2-8") if command == "pareto" else ("--qem", 2)
    assert mpq(command, folder / name, *more).code in (0, 2)  # a table may lack what is needed
    assert asked == [folder / name]


@pytest.mark.parametrize("command", ["plan", "sweep", "measure"])
def test_a_factory_is_called_once(mpq: Callable[..., Ran], folder: Path, command: str) -> None:
    assert mpq(command, f"{HERE}:net").code == 0
    assert len(made) == 1


def test_what_a_source_is(folder: Path) -> None:
    table, checkpoint, none = (resolve_source(str(folder / name)) for name in ("net.mpqt", "net.pt", "none"))
    module = resolve_source(f"{HERE}:net")
    assert [one.kind for one in (table, checkpoint, none, module)] == ["table", "checkpoint", "checkpoint", "module"]
    assert [one.is_table for one in (table, checkpoint, module)] == [True, False, False]
    assert (table.path, checkpoint.module) == (folder / "net.mpqt", None)
    assert isinstance(module.module, nn.Module)
    assert module.weights is module.module
