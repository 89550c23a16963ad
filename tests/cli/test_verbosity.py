"""--verbose and --quiet, before a command and after it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mpq_plugins.cli.main import cli
from tests.conftest import Ran

Mpq = Callable[..., Ran]
COMMANDS = sorted(cli.commands)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file({f"layer{i}.weight": torch.randn(8, 8) for i in range(3)} | {"norm.weight": torch.ones(8, 8, 8, 8, 8, 8)},
              tmp_path / "net.safetensors")  # fmt: skip
    return tmp_path / "net.safetensors"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_both_under_output(mpq: Mpq, name: str) -> None:
    _, _, output = mpq(name, "--help").out.partition("\nOutput:\n")
    assert "-v, --verbose" in output
    assert "-q, --quiet" in output


def test_quiet_silences_notes_and_keeps_results_and_warnings(mpq: Mpq, checkpoint: Path) -> None:
    loud = mpq("plan", checkpoint, "--qem", "1.5")
    notes = [line for line in loud.err.splitlines() if not line.startswith("mpq: warning")]
    assert notes != []
    for quiet in (("--quiet", "plan", checkpoint), ("plan", checkpoint, "-q")):
        ran = mpq(*quiet, "--qem", "1.5")
        assert (ran.code, ran.out) == (0, loud.out)
        assert ran.err.splitlines() == [line for line in loud.err.splitlines() if line not in notes]


def test_quiet_keeps_errors(mpq: Mpq, tmp_path: Path) -> None:
    ran = mpq("-q", "show", tmp_path / "none.json")
    assert ran.code == 2
    assert ran.err.startswith("mpq: error: ")


def test_verbose_says_parameters_and_logs_what_is_done(mpq: Mpq, checkpoint: Path) -> None:
    plain = mpq("plan", checkpoint, "--qem", "1.5")
    loud = mpq("plan", checkpoint, "--qem", "1.5", "-v")
    assert "parameters    qem=1.5" not in plain.out
    assert "parameters    qem=1.5" in loud.out
    assert set(plain.out.splitlines()) <= set(loud.out.splitlines())
    added = [line for line in loud.err.splitlines() if line not in plain.err.splitlines()]
    assert any(line.startswith("mpq: measurement.measure: 3 layers") for line in added)
    assert not any("layer1" in line for line in added)
    everything = mpq("plan", checkpoint, "--qem", "1.5", "-vv").err
    assert "mpq: measurement.measure: layer1\n" in everything
    assert mpq("-v", "plan", checkpoint, "--qem", "1.5", "-v").err == everything


def test_verbose_changes_no_json(mpq: Mpq, checkpoint: Path) -> None:
    assert mpq("plan", checkpoint, "--json", "-v").out == mpq("plan", checkpoint, "--json").out


@pytest.mark.parametrize("words", [("-q", "plan", "x", "-v"), ("plan", "x", "-v", "-q")])
def test_opposites_are_refused(mpq: Mpq, words: tuple[str, ...]) -> None:
    ran = mpq(*words)
    assert ran.code == 2
    assert ran.err == "mpq: error: --verbose and --quiet ask for opposites; give one\n"
