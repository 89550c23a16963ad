"""Names of backends, and what is said of those that there are not."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_model

from mpq_plugins.cli.backends import READ_BY
from mpq_plugins.common import registry
from tests.conftest import Ran
from tests.helpers.nets import conv_net

Mpq = Callable[..., Ran]


@pytest.fixture
def planned(mpq: Mpq, tmp_path: Path) -> tuple[Path, Path]:
    save_model(conv_net(), str(tmp_path / "net.safetensors"))
    assert mpq("plan", tmp_path / "net.safetensors", "-o", tmp_path / "plan.json").code == 0
    return tmp_path / "plan.json", tmp_path / "net.safetensors"


@pytest.mark.parametrize(("name", "said"), [
    ("vllm", "vllm runs what compressed_tensors makes"), ("llama.cpp", "llama.cpp runs what gguf makes"),
    ("brevits", "Did you mean brevitas?"), ("tpu", "there are brevitas, fx, "),
])  # fmt: skip
def test_a_backend_that_there_is_not(mpq: Mpq, planned: tuple[Path, Path], name: str, said: str) -> None:
    ran = mpq("check", *planned, "--backend", name)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert f"backend: '{name}' is not installed; there are " in ran.err
    assert said in ran.err
    assert ran.err.count(" gguf,") == 1


def test_what_runs_files_leads_to_the_exporter(mpq: Mpq, planned: tuple[Path, Path], tmp_path: Path) -> None:
    ran = mpq("export", *planned, "--to", "vLLM", "-o", tmp_path / "out")
    assert ran.code == 2
    assert "to: 'vLLM' is not installed; there are compressed_tensors, " in ran.err
    assert ran.err.endswith("vLLM runs what compressed_tensors makes\n")
    assert not (tmp_path / "out").exists()


def test_what_is_led_to_is_there() -> None:
    there = {name for group in registry.BACKENDS for name in registry.names(group)}
    assert set(READ_BY.values()) <= there
    assert not there & READ_BY.keys()
