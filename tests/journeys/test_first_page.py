"""The first 80 lines of the README, their commands copied, on a module that is not of this repository."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

from mpq_plugins import Plan
from tests.docs.pages import README, blocks

LINES = 80
MODULE = """
import torch
from torch import nn


def net():
    torch.manual_seed(3)
    layers = (nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 20, 3), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(20 * 4 * 4, 10)).eval()


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 3, 8, 8, generator=generator) for _ in range(4)]


def score(model):
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        difference = model(images) - net()(images)
    return -float(difference.square().mean())
"""


def test_the_first_80_lines_are_enough(tmp_path: Path) -> None:
    top = tmp_path / "top.md"
    top.write_text("".join(README.read_text().splitlines(keepends=True)[:LINES]))
    assert top.read_text().count("```") % 2 == 0, "a block is cut"
    given = [block for block in blocks(top) if block.title or block.runs]
    assert given[0].title == "mine.py"
    (tmp_path / "mine.py").write_text(MODULE)
    commands = "\n".join(block.text for block in given if block.language == "bash")
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "120",
    }  # fmt: skip
    ran = subprocess.run(
        ["bash", "-ec", commands], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.allocator.name == "budget"
    assert 2.9 < plan.size().average_bits <= 3
    for layer in plan.layers:
        assert f"│ {layer.name} " in ran.stdout
    for rounding in ("nearest", "compensated"):
        assert f"│ plan.json │ {rounding} " in ran.stdout
    code = "\n".join(block.text for block in given if block.language == "python" and not block.title)
    assert "fx.verify" in code
    script = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert script.returncode == 0, script.stderr
    evaluated = subprocess.run(
        [Path(sys.executable).parent / "mpq", "evaluate", "mine.py:net", "plan.json", "--eval", "mine.py:score",
         "--calibrate", "mine.py:batches", "-o", "rows.csv", "--json"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    exact, plain, compensated = (row["scores"]["score"] for row in json.loads(evaluated.stdout)["rows"])
    in_fx = float(script.stdout.splitlines()[-1])
    # Compensated is nearer to the float model than to nearest, and FX with its 8-bit activations stays near that.
    assert plain < compensated < exact == 0
    assert abs(in_fx - compensated) < 0.5 * abs(plain)
    with (tmp_path / "rows.csv").open() as file:
        assert [row["rounding"] for row in csv.DictReader(file)] == ["", "nearest", "compensated"]
