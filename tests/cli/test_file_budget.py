"""--file-bits and --file-size: plans and containers that take what was asked."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mpq_plugins import Affine, Container, LayerTable, Plan, Uniform, measure
from mpq_plugins.plans.steps import steps_of
from tests.conftest import Ran
from tests.helpers.says import names

Mpq = Callable[..., Ran]

ME = "tests.cli.test_file_budget"


def factory() -> nn.Module:
    """A network for the command line."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(64, 10),
    ).eval()  # fmt: skip


def batches() -> list[Tensor]:
    """Inputs for the command line."""
    return [torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The network's checkpoint."""
    save_file(factory().state_dict(), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def test_a_plan_and_its_file_take_what_was_asked(mpq: Mpq, checkpoint: Path, tmp_path: Path) -> None:
    made = mpq("plan", checkpoint, "--file-bits", "2.5", "-o", tmp_path / "plan.json")
    assert made.code == 0, made.err
    assert names(made.out, "entropy-coded, step", "file", "bits a weight, with its header")
    plan = Plan.load(tmp_path / "plan.json")
    assert len({*steps_of(plan).values()}) == 1
    written = mpq("compress", checkpoint, tmp_path / "plan.json", "-o", tmp_path / "net.mpq")
    assert written.code == 0, written.err
    container = Container.open(tmp_path / "net.mpq")
    assert 2.45 <= container.file_bits <= 2.5
    assert container.size == pytest.approx(plan.allocator.found["file_bytes"], rel=0.02)
    shown = mpq("show", tmp_path / "plan.json")
    assert names(shown.out, "coded", "entropy-coded")
    layers = json.loads(mpq("plan", checkpoint, "--file-bits", "2,3", "--json").out)
    assert [one["allocator"]["parameters"]["file_bits"] for one in layers] == [2.0, 3.0]


@pytest.mark.parametrize("inputs", [(), ("--calibrate", f"{ME}:batches"), ("--synthetic", "32,3,8,8")], ids=str)
def test_a_model_is_compressed_without_a_plan(mpq: Mpq, inputs: tuple[str, ...], tmp_path: Path) -> None:
    made = mpq("compress", f"{ME}:factory", "-o", tmp_path / "net.mpq", "--file-size", "12kB", *inputs)
    assert made.code == 0, made.err
    container = Container.open(tmp_path / "net.mpq")
    assert 0.97 * 12_000 <= container.size <= 12_000
    took_out = mpq("inspect", tmp_path / "net.mpq", "--plan", tmp_path / "plan.json")
    assert took_out.code == 0
    assert Plan.load(tmp_path / "plan.json") == container.plan


def test_a_checkpoint_is_rounded_in_its_model(mpq: Mpq, checkpoint: Path, tmp_path: Path) -> None:
    words = ("--file-size", "12kB", "--calibrate", f"{ME}:batches")
    made = mpq("compress", checkpoint, "--model", f"{ME}:factory", "-o", tmp_path / "one.mpq", *words)
    assert made.code == 0, made.err
    assert mpq("compress", f"{ME}:factory", "-o", tmp_path / "two.mpq", *words).code == 0
    one, two = (Container.open(tmp_path / f"{name}.mpq").tensor("3.weight") for name in ("one", "two"))
    assert one.equal(two)


def test_a_plan_of_widths_is_compressed_with_compensated_weights(mpq: Mpq, tmp_path: Path) -> None:
    Uniform(bits=2)(measure(factory(), Affine(granularity="per_channel"), (2,))).save(tmp_path / "plan.json")
    for name, inputs in (("plain", ()), ("rounded", ("--calibrate", f"{ME}:batches"))):
        made = mpq("compress", f"{ME}:factory", tmp_path / "plan.json", "-o", tmp_path / f"{name}.mpq", *inputs)
        assert made.code == 0, made.err
    plain, rounded = (Container.open(tmp_path / f"{name}.mpq").tensor("3.weight") for name in ("plain", "rounded"))
    assert not plain.equal(rounded)


def test_a_table_plans_without_writing(mpq: Mpq, checkpoint: Path, tmp_path: Path) -> None:
    assert mpq("measure", checkpoint, "--scheme", "entropy_coded", "-o", tmp_path / "net.mpqt").code == 0
    assert LayerTable.load(tmp_path / "net.mpqt").layers[0].coded is not None
    made = mpq("plan", tmp_path / "net.mpqt", "--file-size", "12kB", "-o", tmp_path / "plan.json")
    assert made.code == 0, made.err
    assert names(made.out, "predicted")


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (("compress", "NET"), ("no PLAN", "--file-bits")),
        (("compress", "NET", "PLAN", "--file-bits", "2"), ("PLAN and --file-bits",)),
        (("compress", "NET", "--file-bits", "0"), ("file_bits", "0")),
        (("compress", "NET", "--file-size", "5 apples"), ("file_size", "5 apples")),
        (("compress", "NET", "--file-size", "500"), ("file_size", "500", "other tensors", "header")),
        (("compress", "NET", "--file-bits", "2", "--file-size", "9kB"), ("file_bits and file_size",)),
        (("compress", "NET", "--file-bits", "2", "--prune", "0.5"), ("prune",)),
        (("compress", "NET", "--file-bits", "2", "--calibrate", f"{ME}:batches"),
         ("calibrate", "--model package.module:factory")),
        (("compress", f"{ME}:factory", "--file-bits", "2", "--calibrate", f"{ME}:batches", "--rounding", "learned"),
         ("rounding", "learned")),
        (("compress", "TABLE", "--file-bits", "2"), ("is a table",)),
        (("compress", "NET", "CODED", "--coding", "packed"), ("packed", "smallest")),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_one_line_and_no_file(
    mpq: Mpq, checkpoint: Path, tmp_path: Path, words: tuple[str, ...], facts: tuple[str, ...]
) -> None:
    plain, coded, table = tmp_path / "plan.json", tmp_path / "coded.json", tmp_path / "net.mpqt"
    Uniform(bits=4)(measure(factory(), Affine(), (4,), fold_bn=False)).save(plain)
    assert mpq("plan", checkpoint, "--file-bits", "2.5", "-o", coded).code == 0
    measure(factory(), Affine()).save(table)
    given = {"NET": checkpoint, "PLAN": plain, "CODED": coded, "TABLE": table}
    made = mpq(*(given.get(word, word) for word in words), "-o", tmp_path / "out.mpq")
    assert made.code == 2
    assert names(made.err, *facts), made.err
    assert len(made.err.strip().splitlines()) == 1
    assert not (tmp_path / "out.mpq").exists()
