"""Help by sections, and options of closed lists: completion, and what was perhaps meant."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete

from mpq_plugins.cli.help import OTHER, SECTIONS, SectionOption, section_of
from mpq_plugins.cli.main import cli
from tests.conftest import Ran

Mpq = Callable[..., Ran]
COMMANDS = sorted(cli.commands)


def context(name: str) -> click.Context:
    return click.Context(cli.commands[name], info_name=name, parent=click.Context(cli, info_name="mpq"))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_a_section(name: str) -> None:
    with context(name) as ctx:
        options = [one for one in cli.commands[name].get_params(ctx) if isinstance(one, click.Option)]
    assert [option.name for option in options if section_of(option) == OTHER] == []


def test_no_section_names_an_option_that_no_command_has() -> None:
    known = set()
    for name in COMMANDS:
        with context(name) as ctx:
            known |= {parameter.name for parameter in cli.commands[name].get_params(ctx)}
    assert {name for names in SECTIONS.values() for name in names} <= known


def test_help_names_every_command_once() -> None:
    text = cli.get_help(click.Context(cli, info_name="mpq"))
    assert [text.count(f"\n  {name} ") for name in COMMANDS] == [1] * len(COMMANDS)


def test_an_allocators_options_follow_the_plans(mpq: Mpq) -> None:
    ran = mpq("plan", "-a", "budget", "--help")
    assert ran.code == 0
    titles = [
        line.removesuffix(":") for line in ran.out.splitlines() if line.endswith(":") and not line.startswith(" ")
    ]
    assert titles == ["Plan", "Allocator budget", "Layers and weights", "Scheme", "Output"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_read_on_one_screen(mpq: Mpq, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = mpq(name, "--help").out.splitlines()
    assert len(lines) <= 62
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("allocator", ["budget", "mixquant", "ptilmpq", "sqnr", "uniform"])
def test_an_allocators_options_do_not_repeat_the_title_over_them(mpq: Mpq, allocator: str) -> None:
    text = mpq("plan", "-a", allocator, "--help").out
    assert f"Allocator {allocator}:" in text
    assert f"[{allocator}]" not in text


def test_the_default_of_two_flags_is_one_of_them(mpq: Mpq) -> None:
    text = " ".join(mpq("plan", "-a", "budget", "--help").out.split())
    assert "default --parts" in text
    assert "default --asymmetric" in text
    for word in ("default True", "default False"):
        assert word not in text


def test_a_field_that_some_schemes_have_says_which(mpq: Mpq) -> None:
    text = " ".join(mpq("measure", "--help").out.split())
    assert "--range NAME [affine] range of codes: minmax, percentile, mse, kl" in text
    assert "--symmetric / --asymmetric [affine] " in text
    assert "--granularity NAME scales: per_tensor, per_channel, per_group" in text


def test_rare_options_are_listed_where_their_scheme_is_named(mpq: Mpq) -> None:
    for words, listed in (([], False), (["--scheme", "affine"], True), (["--scheme", "codebook"], False)):
        text = mpq("measure", *words, "--help").out
        assert ("--full-range" in text, "--scale-dtype" in text) == (listed, listed)


@pytest.mark.parametrize(
    ("words", "begun", "completions"),
    [
        (["plan", "--scheme"], "", ["affine", "piecewise", "codebook", "entropy_coded", "ggml", "minifloat"]),
        (["plan", "--granularity"], "per_c", ["per_channel"]),
        (["plan", "--range"], "m", ["minmax", "mse"]),
        (["plan", "--allocator"], "mix", ["mixquant"]),
        (["plan", "-a", "mixquant", "--metric"], "r", ["relative", "rmse"]),
        (["check", "--policy"], "n", ["nearest"]),
        (["check", "--backend"], "t", ["torchao"]),
        (["measure", "--sensitivity"], "k", ["kl"]),
        (["measure", "--metrics"], "mse,r", ["mse,relative", "mse,rmse"]),
        (["measure", "--metrics"], "", ["relative", "mse", "rmse", "sqnr_db", "max_abs"]),
    ],
)
def test_closed_lists_are_completed(words: list[str], begun: str, completions: list[str]) -> None:
    found = ShellComplete(cli, {}, "mpq", "_MPQ_COMPLETE").get_completions(words, begun)
    assert [item.value for item in found] == completions


@pytest.mark.parametrize(
    ("words", "option", "value", "meant"),
    [
        (["measure", "x", "--scheme", "afine"], "scheme", "afine", "affine"),
        (["measure", "x", "--granularity", "perchannel"], "granularity", "perchannel", "per_channel"),
        (["measure", "x", "--range", "msee"], "range", "msee", "mse"),
        (["measure", "x", "--breakpoint", "gausian"], "breakpoint", "gausian", "gaussian"),
        (["measure", "x", "--metrics", "mse,relativ"], "metrics", "relativ", "relative"),
        (["check", "x", "y", "--policy", "upp"], "policy", "upp", "up"),
        (["plan", "x", "--metric", "relatve"], "metric", "relatve", "relative"),
    ],
)
def test_what_is_not_in_a_closed_list_is_named_with_what_is(
    mpq: Mpq, words: list[str], option: str, value: str, meant: str
) -> None:
    ran = mpq(*words)
    assert ran.code == 2
    assert f"{option}: {value!r} is not allowed; " in ran.err
    assert f"Did you mean {meant}?" in ran.err


@pytest.mark.parametrize("words", [("plann",), ("plan", "x", "--shceme", "affine")])
def test_a_word_misspelled_is_said_with_what_was_perhaps_meant(mpq: Mpq, words: tuple[str, ...]) -> None:
    ran = mpq(*words)
    assert ran.code == 2
    assert "Did you mean" in ran.err


def test_an_option_made_from_a_field_says_its_section() -> None:
    assert section_of(SectionOption(["--edge"], section="Allocator firstlast")) == "Allocator firstlast"


@pytest.mark.parametrize(
    ("words", "wanted"), [("mpq plan mo", "file"), ("mpq sw", "sweep"), ("mpq plan x -a bud", "budget")]
)
def test_a_shell_gets_candidates_and_nothing_else(words: str, wanted: str) -> None:
    asked = {"_MPQ_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    run = [Path(sys.executable).parent / "mpq"]
    done = subprocess.run(run, env={**os.environ, **asked}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert wanted in done.stdout


COMPLETED = """
eval "$(_MPQ_COMPLETE=bash_source mpq)"
complete -p mpq
COMP_WORDS=({words}); COMP_CWORD={place}
_mpq_completion mpq
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("words", "place", "wanted"),
    [
        ("mpq sw", 1, "sweep"),
        ("mpq plan x -a bud", 4, "budget"),
        ("mpq show --pl", 2, "--plot"),
        ("mpq show --q", 2, "--quiet"),
    ],
)
def test_bash_completes_after_the_documented_line(words: str, place: int, wanted: str) -> None:
    folder = str(Path(sys.executable).parent)
    script = COMPLETED.format(words=words, place=place)
    done = subprocess.run(
        ["bash", "--norc", "-c", script], env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    registered, *found = done.stdout.splitlines()
    assert registered.endswith("-F _mpq_completion mpq")
    assert found == [wanted]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_script_too(shell: str) -> None:
    run = [Path(sys.executable).parent / "mpq"]
    done = subprocess.run(
        run, env={**os.environ, "_MPQ_COMPLETE": f"{shell}_source"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"_MPQ_COMPLETE={shell}_complete" in done.stdout
