"""Which allocator a command line asks for, against a table of words and what they mean."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click import UsageError
from safetensors.torch import save_model

from mpq_plugins.cli.chosen import chosen_allocator
from mpq_plugins.errors import PluginError
from tests.conftest import Ran
from tests.helpers.nets import conv_net

OWN = ("--output", "-o", "--table", "--json")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("", "budget"),
        ("--average-bits 3", "budget"),
        ("--average-bits=3", "budget"),
        ("--size-bytes 9000 --pin fc=8", "budget"),
        ("--no-parts", "budget"),
        ("--bits 2-8", "budget"),
        ("--bits 4,8", "budget"),
        ("--bits 4", "uniform"),
        ("--bits=4", "uniform"),
        ("--bits 4 --bits 8", "uniform"),
        ("--bits 4 --average-bits 3", "budget"),
        ("--qem 2", "mixquant"),
        ("--qem 2 --bits 2-6", "mixquant"),
        ("--qem 2 --bits 6", "mixquant"),
        ("--metric mse", "mixquant"),
        ("--alpha 0.5", "ptilmpq"),
        ("--alpha 0.5 --average-bits 3", "ptilmpq"),
        ("--granularity per_tensor", "budget"),
        ("--output qem --json", "budget"),
        ("-a mixquant --average-bits 3", "mixquant"),
        ("-- --qem", "budget"),
        ("-qa mixquant", "mixquant"),
        ("-vamixquant", "mixquant"),
        ("-qv --qem 2", "mixquant"),
    ],
)
def test_options_choose_the_allocator_that_has_them(words: str, name: str) -> None:
    assert chosen_allocator(["net.pt", *words.split()], OWN)[0] == name


@pytest.mark.parametrize("words", ["--qem 2 --alpha 0.5", "--qem 2 --size-bytes 900", "--alpha 1 --pin a=8"])
def test_options_of_several_are_refused_with_their_owners(words: str) -> None:
    with pytest.raises(UsageError) as caught:
        chosen_allocator(words.split(), OWN)
    for option in words.split()[::2]:
        assert f"{option} belongs to" in caught.value.message


def test_a_typo_in_the_name_is_answered_with_the_one_meant() -> None:
    with pytest.raises(PluginError, match=r"'unifrom' is not installed; .* Did you mean uniform"):
        chosen_allocator(["-a", "unifrom"], OWN)


def test_nothing_asked_is_a_budget_of_4_bits_and_said(mpq: Callable[..., Ran], tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_model(conv_net(), str(path))
    asked, unasked = mpq("plan", path, "--average-bits", 4), mpq("plan", path)
    assert unasked.out.startswith(asked.out)
    assert "--average-bits 3" in unasked.out.removeprefix(asked.out)
    document = json.loads(mpq("plan", path, "--json").out)
    assert document["allocator"]["parameters"]["average_bits"] == 4
    assert not document["predicted"]["worse"]


@pytest.mark.parametrize(
    ("typo", "meant"), [("--alph", "--alpha"), ("--qemm", "--qem"), ("--averge-bits", "--average-bits")]
)
def test_a_mistyped_option_of_any_allocator_is_answered_with_the_one_meant(
    mpq: Callable[..., Ran], tmp_path: Path, typo: str, meant: str
) -> None:
    path = tmp_path / "net.safetensors"
    save_model(conv_net(), str(path))
    ran = mpq("plan", path, typo, 3)
    assert ran.code == 2
    assert f"No such option '{typo}'. Did you mean {meant}?" in ran.err
