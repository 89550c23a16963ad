"""`mpq reconstruct`: the library's own result as a checkpoint, interrupted or not, and one line for what is refused."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import mpq_plugins as mpq_library
from mpq_plugins import Affine, BlockReport, Piecewise, Plan, Uniform, measure, verify
from mpq_plugins.plans.scheme import Scheme
from tests.conftest import Ran

pytestmark = pytest.mark.usefixtures("one_thread")

Mpq = Callable[..., Ran]
Words = list[str]

ME = "tests.cli.test_reconstruct"
PER_CHANNEL = Affine(granularity="per_channel")
ROWS = torch.randn(24, 6, generator=torch.Generator().manual_seed(2)) + 0.3
STEPS: Words = ["--steps", "12", "--batch-size", "8", "--lr", "0.05"]


FAILS: list[type[BaseException]] = []


@pytest.fixture(autouse=True)
def nothing_fails() -> Iterator[None]:
    """Whatever a test made fail."""
    yield
    FAILS.clear()


class Block(nn.Module):
    """Two layers around a shortcut; while it learns, it may fail."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.fails = nn.Linear(6, 8), nn.Linear(8, 6), fails

    def forward(self, x: Tensor) -> Tensor:
        if self.fails and FAILS and torch.is_grad_enabled():
            raise FAILS.pop()
        found: Tensor = self.down(torch.relu(self.up(x))) + x
        return found


class Net(nn.Module):
    """A layer, two blocks, a head; (N, 6) -> (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.blocks = nn.Sequential(Block(), Block(fails=True))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        print("running")
        logits: Tensor = self.head(self.blocks(torch.relu(self.stem(x))))
        return logits


def net() -> Net:
    """In training mode, as factories give them."""
    torch.manual_seed(0)
    return Net()


def talking_net() -> Net:
    print("loading weights")
    return net()


def folding_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 4, 3, bias=False), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(16, 3))


def signals() -> list[Tensor]:
    return list(ROWS[:, None].split(8))


def other_net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 3))


def half_net() -> nn.Module:
    return net().to(torch.bfloat16)


def batches() -> list[Tensor]:
    print("reading images")
    return list(ROWS.split(8))


def none_at_all() -> list[Tensor]:
    return []


def wrong_shape() -> list[Tensor]:
    return [torch.zeros(2, 5)]


def not_numbers() -> list[Tensor]:
    return [ROWS * float("nan")]


def broken() -> list[Tensor]:
    raise KeyError("data/train")


def distance(model: nn.Module) -> Mapping[str, float]:
    """Names and numbers, with something said on the way."""
    print("evaluating")
    with torch.no_grad():
        return {"distance": float((model(ROWS) - net().eval()(ROWS)).square().mean())}


def fails(model: nn.Module) -> float:
    raise RuntimeError("no such file")


NET, BATCHES = f"{ME}:net", f"{ME}:batches"


def plan_of(model: nn.Module, bits: int = 2, scheme: Scheme = PER_CHANNEL) -> Plan:
    return Uniform(bits=bits)(measure(model, scheme, (bits,)))


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    """A plan of 2 bits."""
    path = tmp_path / "plan.json"
    plan_of(net()).save(path)
    return path


def expected(plan_file: Path, **changes: Any) -> tuple[dict[str, Tensor], list[BlockReport]]:
    """What the library makes with the same settings."""
    reports: list[BlockReport] = []
    settings: dict[str, Any] = {"steps": 12, "batch_size": 8, "lr": 0.05, **changes}
    given = list(ROWS.split(8))
    learned = mpq_library.reconstruct(net().eval(), Plan.load(plan_file), given, finished=reports.append, **settings)
    return learned.state_dict(), reports


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(value) for name, value in other.items())


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_checkpoint_is_what_the_library_makes(mpq: Mpq, plan_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "learned.safetensors"
    ran = mpq("reconstruct", NET, plan_file, "--calibrate", BATCHES, *STEPS, "-o", out)
    assert ran.code == 0, ran.err
    state, reports = expected(plan_file)
    assert any(report.changed for report in reports)
    assert same(load_file(out), state)
    assert left_in(tmp_path) == ["learned.safetensors", "plan.json"]
    assert ran.out.splitlines()[-1] == f"wrote {out}"
    for report in reports:
        assert f" {report.name} " in ran.out
    assert "reading images" not in ran.out
    loaded = net()
    loaded.load_state_dict(load_file(out))
    verify(loaded, Plan.load(plan_file), original=loaded)


def test_mpq_apply_finds_the_learned_codes_in_it(mpq: Mpq, plan_file: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "learned.safetensors", tmp_path / "again.safetensors"
    assert mpq("reconstruct", NET, plan_file, "--calibrate", BATCHES, *STEPS, "-o", out).code == 0
    ran = mpq("apply", out, plan_file, "-o", again)
    assert ran.code == 0, ran.err
    assert same(load_file(again), load_file(out))


def test_a_folded_plan_gives_a_checkpoint_for_the_model_or_is_refused(mpq: Mpq, tmp_path: Path) -> None:
    plan, out = plan_of(folding_net().eval(), scheme=Affine()), tmp_path / "learned.safetensors"
    assert plan.fold_bn
    plan.save(tmp_path / "plan.json")
    words = ("--calibrate", f"{ME}:signals", *STEPS, "-o", out)
    ran = mpq("reconstruct", f"{ME}:folding_net", tmp_path / "plan.json", *words)
    if ran.code == 0:
        folding_net().load_state_dict(load_file(out))
    else:
        refused(ran, "fold")
        assert left_in(tmp_path) == ["plan.json"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (["--loss", "fisher"], {"loss": "fisher"}),
        (["--regulariser", "0.5"], {"regulariser": 0.5}),
        (["--mix", "0.5"], {"mix": 0.5}),
        (["--correct"], {"correct": True}),
        (["--tune", "norms"], {"tune": "norms"}),
        (["--seed", "7"], {"seed": 7}),
        (["--blocks", "blocks"], {"blocks": "blocks"}),
        (["--blocks", "blocks.0", "--blocks", "re:blocks[.]1"], {"blocks": ["blocks.0", "blocks.1"]}),
        (["--device", "cpu", "--memory", "0"], {}),
    ],
    ids=str,
)
def test_every_option_is_the_librarys_argument(
    mpq: Mpq, plan_file: Path, tmp_path: Path, words: Words, changes: dict[str, Any]
) -> None:
    out = tmp_path / "learned.safetensors"
    ran = mpq("reconstruct", NET, plan_file, "--calibrate", BATCHES, *STEPS, *words, "-o", out, "--json")
    assert ran.code == 0, ran.err
    state, reports = expected(plan_file, **changes)
    assert same(load_file(out), state)
    assert [own["name"] for own in json.loads(ran.out)["blocks"]] == [report.name for report in reports]


@pytest.mark.parametrize("factory", ["net", "talking_net"])
def test_json_is_json_alone(mpq: Mpq, plan_file: Path, tmp_path: Path, factory: str) -> None:
    out = tmp_path / "learned.safetensors"
    ran = mpq(
        "reconstruct", f"{ME}:{factory}", plan_file, "--calibrate", BATCHES, *STEPS, "-o", out, "--json",
        "--eval", f"{ME}:distance",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    _, reports = expected(plan_file)
    size = Plan.load(plan_file).size()
    assert found["average_bits"] == 2
    assert found["total_average_bits"] == pytest.approx(size.total_average_bits)
    assert found["checkpoint"] == str(out)
    shown = [BlockReport(**{**own, "layers": tuple(own["layers"]), "seconds": 0}) for own in found["blocks"]]
    assert shown == [replace(report, seconds=0) for report in reports]
    assert found["scores"]["float"] == {"distance": 0}
    assert 0 < found["scores"]["learned"]["distance"] < found["scores"]["nearest"]["distance"]


def test_scores_are_of_the_float_net_to_nearest_and_learned(mpq: Mpq, plan_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "learned.safetensors"
    words = ("--calibrate", BATCHES, *STEPS, "-o", out, "--eval", f"{ME}:distance")
    ran = mpq("reconstruct", NET, plan_file, *words)
    assert ran.code == 0, ran.err
    learned = net().eval()
    learned.load_state_dict(load_file(out))
    nearest = mpq_library.apply(net().eval(), Plan.load(plan_file))
    values = [f"{distance(own)['distance']:.4g}" for own in (nearest, learned)]
    lines = ["float: distance 0", f"nearest: distance {values[0]}", f"learned: distance {values[1]}"]
    assert ran.out.splitlines()[-4:] == [*lines, f"wrote {out}"]


def test_an_evaluation_that_fails_keeps_what_was_learned(mpq: Mpq, plan_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "learned.safetensors"
    words = ("--calibrate", BATCHES, *STEPS, "-o", out, "--eval", f"{ME}:fails")
    refused(mpq("reconstruct", NET, plan_file, *words), "the evaluation failed (RuntimeError: no such file")
    assert same(load_file(out), expected(plan_file)[0])
    assert left_in(tmp_path) == ["learned.safetensors", "plan.json"]


def test_an_interrupted_run_goes_on_beside_its_output(mpq: Mpq, plan_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "learned.safetensors"
    words = ("reconstruct", NET, plan_file, "--calibrate", BATCHES, *STEPS, "-o", out, "--json")
    FAILS.append(KeyboardInterrupt)
    stopped = mpq(*words)
    assert (stopped.code, stopped.out, FAILS) == (130, "", [])
    assert left_in(tmp_path) == ["learned.safetensors.partial", "plan.json"]
    ran = mpq(*words)
    assert ran.code == 0, ran.err
    assert "going on after the blocks that are finished" in ran.err
    assert [own["resumed"] for own in json.loads(ran.out)["blocks"]] == [True, True, False, False]
    assert same(load_file(out), expected(plan_file)[0])
    assert left_in(tmp_path) == ["learned.safetensors", "plan.json"]
    assert "going on" not in mpq(*words).err


def test_a_block_that_fails_while_it_learns_is_one_line_and_keeps_the_others(
    mpq: Mpq, plan_file: Path, tmp_path: Path
) -> None:
    FAILS.append(RuntimeError)
    refused(mpq("reconstruct", NET, plan_file, *GOOD, "-o", tmp_path / "learned.safetensors"), "block 'blocks.1'")
    with mpq_library.Store(tmp_path / "learned.safetensors.partial") as store:
        assert len(store) == 2


def test_blocks_of_another_job_beside_the_output_are_not_taken(mpq: Mpq, plan_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "learned.safetensors"
    words = ("reconstruct", NET, plan_file, "--calibrate", BATCHES, *STEPS, "-o", out)
    FAILS.append(KeyboardInterrupt)
    assert mpq(*words).code == 130
    before = (tmp_path / "learned.safetensors.partial").read_bytes()
    refused(
        mpq(*words, "--seed", "3"),
        "learned.safetensors.partial: holds what another job finished (it differs in settings)",
    )
    assert (tmp_path / "learned.safetensors.partial").read_bytes() == before
    assert not out.exists()


def test_activation_ranges_are_in_the_checkpoint(mpq: Mpq, plan_file: Path, tmp_path: Path) -> None:
    Plan.load(plan_file).with_activation_bits(4).save(plan_file)
    out = tmp_path / "learned.safetensors"
    words = ("--calibrate", BATCHES, *STEPS, "-o", out, "--eval", f"{ME}:distance", "--json")
    ran = mpq("reconstruct", NET, plan_file, *words)
    assert ran.code == 0, ran.err
    state, _ = expected(plan_file)
    assert same(load_file(out), state)
    assert float(load_file(out)["blocks.0.up.input_quantizer.scale"]) > 0
    assert json.loads(ran.out)["scores"]["learned"]["distance"] > 0


def refused(ran: Ran, message: str) -> None:
    assert ran.code == 2
    assert ran.out == ""
    last = ran.err.splitlines()[-1]
    assert last.startswith("mpq: error: ")
    assert message in last
    assert "Traceback" not in ran.err


GOOD: Words = ["--calibrate", BATCHES, *STEPS]
BAD: list[tuple[str, Words, str]] = [
    (NET, STEPS, "Missing option '--calibrate'"),
    (NET, [*GOOD, "--steps", "0"], "steps: 0 is not allowed; an integer from 1 up"),
    (NET, [*GOOD, "--steps", "many"], "'many' is not a valid integer"),
    (NET, [*GOOD, "--batch-size", "-1"], "batch_size: -1 is not allowed"),
    (NET, [*GOOD, "--lr", "0"], "lr: 0.0 is not allowed"),
    (NET, [*GOOD, "--lr", "nan"], "lr: nan is not allowed"),
    (NET, [*GOOD, "--lr", "inf"], "lr: inf is not allowed"),
    (NET, [*GOOD, "--regulariser", "-1"], "regulariser: -1.0 is not allowed"),
    (NET, [*GOOD, "--mix", "1.5"], "mix: 1.5 is not allowed; a probability"),
    (NET, [*GOOD, "--seed", "-1"], "seed: -1 is not allowed"),
    (NET, [*GOOD, "--loss", "kl"], "'kl' is not one of 'mse', 'fisher'"),
    (NET, [*GOOD, "--tune", "all"], "'all' is not one of 'rounding', 'norms'"),
    (NET, [*GOOD, "--memory", "-1"], "--memory -1.0: GiB, a number from 0 up"),
    (NET, [*GOOD, "--memory", "nan"], "--memory nan: GiB"),
    (NET, [*GOOD, "--memory", "inf"], "--memory inf: GiB"),
    (NET, [*GOOD, "--device", "nowhere"], "device: 'nowhere' cannot be used"),
    (NET, [*GOOD, "--blocks", ""], "blocks: [''] is not allowed"),
    (NET, [*GOOD, "--eval", "score"], "score: names no function"),
    (NET, [*GOOD, "--eval", f"{ME}:missing"], ":missing: the function cannot be found"),
    (NET, [*STEPS, "--calibrate", f"{ME}:none_at_all"], ":none_at_all: none given"),
    (NET, [*STEPS, "--calibrate", f"{ME}:broken"], ":broken: the function cannot be called (KeyError"),
    (NET, [*STEPS, "--calibrate", f"{ME}:net"], ":net: Net is no series of inputs"),
    ("net.safetensors", GOOD, "net.safetensors: names no function"),
    (f"{ME}:missing", GOOD, ":missing: the function cannot be found"),
    (f"{ME}:none_at_all", GOOD, ":none_at_all: returned a list; a torch.nn.Module is needed"),
    (f"{ME}:other_net", GOOD, "the plan was made for another model"),
]
LATE: list[tuple[str, Words, str]] = [
    (NET, [*GOOD, "--blocks", "layer9"], "blocks: 'layer9' match no module"),
    (NET, [*GOOD, "--blocks", "re:("], "no regular expression"),
    (NET, [*STEPS, "--calibrate", f"{ME}:wrong_shape"], "batches: Net does not run on a batch"),
    (NET, [*STEPS, "--calibrate", f"{ME}:not_numbers"], "block 'stem': gives NaN or infinite values"),
    (f"{ME}:half_net", GOOD, "layer 'stem': torch.bfloat16"),
]


@pytest.mark.parametrize(("source", "words", "message"), BAD, ids=[str(k) for k in range(len(BAD))])
def test_bad_words_are_one_line_and_no_file(
    mpq: Mpq, plan_file: Path, tmp_path: Path, source: str, words: Words, message: str
) -> None:
    refused(mpq("reconstruct", source, plan_file, *words, "-o", tmp_path / "learned.safetensors"), message)
    assert left_in(tmp_path) == ["plan.json"]


@pytest.mark.parametrize(("source", "words", "message"), LATE, ids=[str(k) for k in range(len(LATE))])
def test_what_is_refused_before_a_block_is_finished_leaves_nothing(
    mpq: Mpq, plan_file: Path, tmp_path: Path, source: str, words: Words, message: str
) -> None:
    refused(mpq("reconstruct", source, plan_file, *words, "-o", tmp_path / "learned.safetensors"), message)
    assert left_in(tmp_path) == ["plan.json"]


def test_a_plan_of_another_scheme_is_refused_and_leaves_nothing(mpq: Mpq, tmp_path: Path) -> None:
    plan_of(net(), 3, Piecewise()).save(tmp_path / "plan.json")
    words = ("reconstruct", NET, tmp_path / "plan.json", *GOOD, "-o", tmp_path / "learned.safetensors")
    refused(mpq(*words), "layer 'stem': rounding is learned between the levels of one grid")
    assert left_in(tmp_path) == ["plan.json"]


@pytest.mark.parametrize("content", ["", "{}", "[1]", "not json"])
def test_a_damaged_plan_is_one_line(mpq: Mpq, tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    refused(mpq("reconstruct", NET, tmp_path / "plan.json", *GOOD, "-o", tmp_path / "out.safetensors"), "plan.json")
    assert left_in(tmp_path) == ["plan.json"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("learned.pt", "the result is written as safetensors; name a file that ends in that"),
        ("learned", "the result is written as safetensors"),
        ("plan.json", "the result is written as safetensors"),
        ("missing/learned.safetensors", "there is no folder"),
    ],
)
def test_an_output_that_cannot_be_is_refused(
    mpq: Mpq, plan_file: Path, tmp_path: Path, name: str, message: str
) -> None:
    before = plan_file.read_bytes()
    refused(mpq("reconstruct", NET, plan_file, *GOOD, "-o", tmp_path / name), message)
    assert left_in(tmp_path) == ["plan.json"]
    assert plan_file.read_bytes() == before


def test_the_plan_is_not_written_over(mpq: Mpq, plan_file: Path, tmp_path: Path) -> None:
    own = plan_file.rename(tmp_path / "plan.safetensors")
    before = own.read_bytes()
    refused(mpq("reconstruct", NET, own, *GOOD, "-o", own), "is the source itself")
    assert own.read_bytes() == before


def test_an_output_that_is_a_folder_is_refused_before_the_work(mpq: Mpq, plan_file: Path, tmp_path: Path) -> None:
    (tmp_path / "learned.safetensors").mkdir()
    ran = mpq("reconstruct", NET, plan_file, *GOOD, "-o", tmp_path / "learned.safetensors")
    refused(ran, "learned.safetensors is")
    assert left_in(tmp_path) == ["learned.safetensors", "plan.json"]


def test_something_else_where_finished_blocks_go_is_refused_and_kept(mpq: Mpq, plan_file: Path, tmp_path: Path) -> None:
    beside = tmp_path / "learned.safetensors.partial"
    words = ("reconstruct", NET, plan_file, *GOOD, "-o", tmp_path / "learned.safetensors")
    beside.write_text("mine")
    refused(mpq(*words), "is in the way, and no store of finished work")
    assert beside.read_text() == "mine"
    beside.unlink()
    beside.mkdir()
    (beside / "mine").touch()
    refused(mpq(*words), "is in the way, and no ordinary file")
    assert left_in(beside) == ["mine"]
