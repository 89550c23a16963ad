"""What a command may write over: its own files, and others' with --force alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_model

from mpq_plugins.cli.written import kind_of
from tests.conftest import Ran
from tests.helpers.nets import conv_net

Mpq = Callable[..., Ran]
OTHERS = {"plan.json": '{"a": 1}', "t.mpqt": "text", "rows.csv": "a,b\n1,2\n", "p.png": "\x89PNG", "c.mpq": "zip"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_model(conv_net(), str(tmp_path / "net.safetensors"))
    return tmp_path / "net.safetensors"


def commands(checkpoint: Path, folder: Path) -> dict[str, tuple[object, ...]]:
    """A command for each kind of file."""
    return {
        "plan.json": ("plan", checkpoint, "-o", folder / "plan.json"),
        "t.mpqt": ("measure", checkpoint, "-o", folder / "t.mpqt"),
        "rows.csv": ("sweep", checkpoint, "--qem", "2,3", "-o", folder / "rows.csv"),
        "p.png": ("sweep", checkpoint, "--qem", "2,3", "--plot", folder / "p.png"),
        "c.mpq": ("compress", checkpoint, folder / "plan.json", "-o", folder / "c.mpq"),
    }


def test_its_own_files_are_replaced(mpq: Mpq, checkpoint: Path, tmp_path: Path) -> None:
    for name, command in commands(checkpoint, tmp_path).items():
        assert mpq(*command).code == 0, name
        assert kind_of(tmp_path / name), name
        assert mpq(*command).code == 0, name
    assert not kind_of(checkpoint)


@pytest.mark.slow
def test_its_files_of_another_kind_stay_without_force(mpq: Mpq, checkpoint: Path, tmp_path: Path) -> None:
    """A page over a plan, a plan over a table: a slip of the hand, and what was there took time to make."""
    made = commands(checkpoint, tmp_path)
    for command in made.values():
        assert mpq(*command).code == 0
    held = {name: (tmp_path / name).read_bytes() for name in made}
    writers = {**made, "page.html": ("report", tmp_path / "t.mpqt", "-o", tmp_path / "page.html")}
    for own, command in writers.items():
        for name in held.keys() - {own}:
            if own == "p.png" or (own == "c.mpq" and not name.endswith(".mpq")) or name in map(str, command):
                continue  # pictures and containers ask for their own endings
            ran = mpq(*command[:-1], tmp_path / name)
            assert ran.code == 2, (own, name)
            assert ran.err.count("\n") == 1
            assert f"{tmp_path / name} " in ran.err, (own, name)
            assert (tmp_path / name).read_bytes() == held[name]
    ran = mpq("plan", checkpoint, "-o", tmp_path / "rows.csv")
    assert f"{tmp_path / 'rows.csv'} exists, and it is rows as CSV, where this writes a plan; --force" in ran.err
    assert mpq("plan", checkpoint, "-o", tmp_path / "rows.csv", "--force").code == 0


@pytest.mark.parametrize("name", OTHERS)
def test_others_files_stay_without_force(mpq: Mpq, checkpoint: Path, tmp_path: Path, name: str) -> None:
    assert mpq("plan", checkpoint, "-o", tmp_path / "plan.json").code == 0
    (tmp_path / name).write_text(OTHERS[name])
    command = commands(checkpoint, tmp_path)[name]
    refused = mpq(*command)
    assert refused.code == 2
    assert f"{tmp_path / name} exists, and it is not known to be a file of mpq's; --force" in refused.err
    assert refused.err.count("\n") == 1
    assert (tmp_path / name).read_text() == OTHERS[name]
    assert mpq(*command, "--force").code == 0
    assert kind_of(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plan.json", '{"format": "mpq-plan", "my": "notes"}'),
        ("rows.csv", "plan,corrected,x\nmine,1,2\n"),
        ("p.svg", "<svg>about mpq-plugins</svg>"),
    ],
)
def test_what_only_speaks_of_us_is_not_ours(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert not kind_of(tmp_path / name)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_show_has_force_for_its_picture(mpq: Mpq, checkpoint: Path, tmp_path: Path, ending: str) -> None:
    plan, picture = tmp_path / "plan.json", tmp_path / f"p.{ending}"
    assert mpq("plan", checkpoint, "-o", plan).code == 0
    picture.write_text("mine")
    assert mpq("show", plan, "--plot", picture).code == 2
    assert mpq("show", plan, "--plot", picture, "--force").code == 0
    assert mpq("show", plan, "--plot", picture).code == 0


def test_a_checkpoint_is_never_known_to_be_ours(mpq: Mpq, checkpoint: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "q.safetensors"
    assert mpq("plan", checkpoint, "-o", plan).code == mpq("apply", checkpoint, plan, "-o", out).code == 0
    assert "--force writes over it" in mpq("apply", checkpoint, plan, "-o", out).err
    assert mpq("apply", checkpoint, plan, "-o", out, "--force").code == 0


def test_an_empty_file_and_the_demos_default_are_no_exception(
    mpq: Mpq, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty.json").touch()
    assert mpq("plan", checkpoint, "-o", tmp_path / "empty.json").code == 0
    monkeypatch.chdir(tmp_path)
    Path("demo.json").write_text("mine")
    assert "demo.json exists" in mpq("demo").err
    assert Path("demo.json").read_text() == "mine"


@pytest.mark.parametrize(
    "words", [("check", "SOURCE", "PLAN"), ("apply", "PLAN", "SOURCE"), ("compress", "PLAN", "SOURCE"),
              ("evaluate", "PLAN", "SOURCE", "--eval", "mine:score")],
)  # fmt: skip
def test_swapped_arguments_are_said_to_be(mpq: Mpq, checkpoint: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    plan = tmp_path / "plan.json"
    mpq("plan", checkpoint, "-o", plan)
    given = [{"SOURCE": checkpoint, "PLAN": plan}.get(word, word) for word in words]
    ran = mpq(*given, *(() if words[0] in ("check", "evaluate") else ("-o", tmp_path / "out.mpq")))
    assert ran.code == 2
    assert f"{plan} is a plan and {checkpoint} is none, so they are swapped; write mpq {words[0]}" in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize("command", ["apply", "compress", "check"])
def test_a_plan_of_other_weights_is_noted(mpq: Mpq, checkpoint: Path, tmp_path: Path, command: str) -> None:
    plan, other = tmp_path / "plan.json", tmp_path / "other.safetensors"
    assert mpq("plan", checkpoint, "-o", plan).code == 0
    trained = conv_net()
    trained.fc.weight.data.mul_(2)
    save_model(trained, str(other))
    for source, noted in ((checkpoint, False), (other, True)):
        outputs = {"apply": ("-o", tmp_path / f"q-{source.name}"), "compress": ("-o", tmp_path / f"{source.name}.mpq")}
        pair = (plan, source) if command == "check" else (source, plan)
        ran = mpq(command, *pair, *outputs.get(command, ()))
        assert ran.code == 0, ran.err
        assert ("their weights are not those it was made from" in ran.err) is noted
