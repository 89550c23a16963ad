"""No command writes over what it reads, under whatever name; and lists of numbers end."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mpq_plugins import Uniform, compress, measure
from tests.helpers.checkpoints import sharded

LATENCY = {"a": {"2": 1, "4": 2, "8": 3}, "b": {"2": 1, "4": 2, "8": 3}}


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one of everything that commands read, which is also where they run."""
    state = {f"{name}.weight": torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) for name in "ab"}
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "net.safetensors")
    sharded(tmp_path / "model", state)
    table = measure(tmp_path / "net.safetensors")
    table.save(tmp_path / "net.mpqt")
    plan = Uniform(bits=4)(table)
    plan.save(tmp_path / "plan.json")
    compress(tmp_path / "net.safetensors", plan, tmp_path / "net.mpq")
    (tmp_path / "latency.json").write_text(json.dumps(LATENCY))
    (tmp_path / "mine.py").write_text("def batches():\n    raise RuntimeError\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


BUDGET = ("-a", "budget", "--bits", "2,4,8", "--latency-limit", "4", "--latency", "latency.json")
WRITES = [  # the command, and what of the inputs the result would replace
    (("plan", "net.mpqt", *BUDGET, "-o"), "latency.json"),
    (("plan", "net.safetensors", *BUDGET, "--table"), "latency.json"),
    (("plan", "net.mpqt", "-o"), "net.mpqt"),
    (("plan", "net.safetensors", "-o"), "net.safetensors"),
    (("plan", "model", "-o"), "model/config.json"),
    (("plan", "model", "-o"), "model/model.safetensors.index.json"),
    (("plan", "model", "-o"), "model/model-00001-of-00002.safetensors"),
    (("plan", "model/model-00001-of-00002.safetensors", "-o"), "model/config.json"),
    (("measure", "net.safetensors", "-o"), "net.safetensors"),
    (("measure", "mine:net", "--sensitivity", "kl", "--calibrate", "mine:batches", "-o"), "mine.py"),
    (("sweep", "net.mpqt", *BUDGET, "-o"), "latency.json"),
    (("sweep", "net.mpqt", "-o"), "net.mpqt"),
    (("pareto", "net.mpqt", "-o"), "net.mpqt"),
    (("tune", "mine:net", *BUDGET, "--eval", "mine:batches", "-o"), "latency.json"),
    (("tune", "mine:net", "--eval", "mine:batches", "-o"), "mine.py"),
    (("check", "plan.json", "net.safetensors", "--backend", "fx", "-o"), "plan.json"),
    (("check", "plan.json", "net.safetensors", "--backend", "fx", "-o"), "net.safetensors"),
    (("apply", "net.safetensors", "plan.json", "-o"), "plan.json"),
    (("apply", "net.safetensors", "plan.json", "-o"), "net.safetensors"),
    (("compress", "net.safetensors", "plan.json", "-o"), "plan.json"),
    (("decompress", "net.mpq", "-o"), "net.mpq"),
    (("inspect", "net.mpq", "--plan"), "net.mpq"),
    (("reconstruct", "mine:net", "plan.json", "--calibrate", "mine:batches", "-o"), "plan.json"),
]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["itself", "another spelling", "symbolic link", "hard link"])
@pytest.mark.parametrize(("command", "target"), WRITES, ids=[f"{own[0]} {name}" for own, name in WRITES])
def test_no_input_is_written_over(
    mpq: Callable[..., Any], inputs: Path, command: tuple[str, ...], target: str, how: str
) -> None:
    suffix = {"compress": ".mpq", "decompress": ".safetensors", "reconstruct": ".safetensors"}.get(command[0])
    name = inputs / f"link{suffix or Path(target).suffix}"
    if how == "itself":
        name = Path(target)
    elif how == "another spelling":
        name = inputs / "model" / ".." / target
    elif how == "symbolic link":
        name.symlink_to(inputs / target)
    else:
        os.link(inputs / target, name)
    before = {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()}
    ran = mpq(*command, name)
    assert ran.code == 2
    assert len(ran.err.splitlines()) == 1
    assert (
        "is the source itself, or another result" in ran.err or "which is read" in ran.err or "name a file" in ran.err
    )
    assert {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()} == before


def test_a_plan_may_lie_beside_the_weights_and_be_written_again(mpq: Callable[..., Any], inputs: Path) -> None:
    for _ in range(2):
        assert mpq("plan", "model", "-o", "model/plan.json").code == 0


@pytest.mark.parametrize(
    "text",
    ["0:1e999999:1", "0:1:1e-999999", "1:inf:1", "1:2:nan", "nan:1:1", "0:1e99:1e-99", "-1:2:1e-30", "1:2:0", "1:2:-1",
     "1:2", "1:2:3:4", ":::", "0:1:٠.5", "٣", "1,٢", "0:" + "9" * 5000 + ":1", "1_0:2_0:1_0"],
)  # fmt: skip
def test_ranges_without_end_are_refused_at_once(mpq: Callable[..., Any], inputs: Path, text: str) -> None:
    ran = mpq("plan", "net.mpqt", f"--qem={text}")
    assert ran.code == 2
    assert len(ran.err.splitlines()) == 1
    assert "--qem" in ran.err


@pytest.mark.parametrize("text", ["2-٨", "²", "9" * 5000, "2-" + "9" * 5000, "0-65537", "+2", "2_0", "-1", "2--3"])
def test_lists_of_integers_are_of_ascii_digits_and_end(mpq: Callable[..., Any], inputs: Path, text: str) -> None:
    ran = mpq("measure", "net.safetensors", f"--bits={text}")
    assert ran.code == 2
    assert len(ran.err.splitlines()) == 1
    assert "is no list of integers" in ran.err or "goes beyond" in ran.err
