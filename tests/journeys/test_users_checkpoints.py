"""Journeys of users' checkpoints on the command line: a plan from the module, applied to the file that is at hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpq_plugins import Plan, apply, decompress
from mpq_plugins.checkpoints.checkpoint import load_torch
from tests.conftest import Ran

ME = __name__
Mpq = Callable[..., Ran]


class UNet(nn.Module):
    """A transposed convolution, and a norm over three dimensions; (N, 3, 8, 8) -> (N, 3, 16, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.LayerNorm((8, 8, 8))
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.out = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        images: Tensor = self.out(self.up(torch.relu(self.norm(self.down(x)))))
        return images


def unet() -> UNet:
    torch.manual_seed(0)
    net = UNet().eval()
    nn.init.normal_(net.norm.weight, 1, 0.2)
    return net


def other() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3))


def batches() -> list[Tensor]:
    return list(torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))


def write(folder: Path, name: str, state: dict[str, Any]) -> Path:
    if name.endswith("safetensors"):
        save_file(state, folder / name)
    else:
        torch.save(state, folder / name)
    return folder / name


@pytest.fixture
def plan(tmp_path: Path, mpq: Mpq) -> Path:
    """By channel, so that which axis has the channels matters."""
    ran = mpq("plan", f"{ME}:unet", "-a", "budget", "--average-bits", 3, "-o", tmp_path / "plan.json")
    assert ran.code == 0
    assert "norm.weight" in ran.err
    return tmp_path / "plan.json"


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model."])
@pytest.mark.parametrize("options", [[], ["--model", f"{ME}:unet"]], ids=["", "model"])
def test_a_modules_plan_is_applied_to_and_compressed_with_its_own_checkpoint(
    tmp_path: Path, mpq: Mpq, plan: Path, name: str, prefix: str, options: list[str]
) -> None:
    source = write(tmp_path, name, {f"{prefix}{own}": value for own, value in unet().state_dict().items()})
    assert mpq("check", plan, source, *options).code == 0
    assert mpq("apply", source, plan, *options, "-o", tmp_path / f"q.{name}").code == 0
    assert mpq("compress", source, plan, *options, "-o", tmp_path / "q.mpq").code == 0
    expected = apply(unet(), Plan.load(plan)).state_dict()
    written = load_torch(tmp_path / f"q.{name}") if name.endswith("pt") else load_file(tmp_path / f"q.{name}")
    for own, value in expected.items():
        assert written[f"{prefix}{own}"].equal(value)
    read = decompress(tmp_path / "q.mpq")
    assert sorted(own.rpartition(".")[2] for own in read) == sorted(own.rpartition(".")[2] for own in expected)
    assert all(any(own.endswith(n) and v.equal(value) for own, v in read.items()) for n, value in expected.items())


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_its_biases_are_corrected_where_they_are_in_the_checkpoint(
    tmp_path: Path, mpq: Mpq, plan: Path, prefix: str
) -> None:
    source = write(tmp_path, "net.pt", {f"{prefix}{own}": value for own, value in unet().state_dict().items()})
    words = ["--model", f"{ME}:unet", "--calibrate", f"{ME}:batches", "-o", tmp_path / "q.pt", "--json"]
    ran = mpq("apply", source, plan, *words)
    assert ran.code == 0
    changed = json.loads(ran.out)["corrected"]
    assert {own.removeprefix(prefix) for own in changed} == {"down.bias", "up.bias", "out.bias"}
    corrected = apply(unet(), Plan.load(plan), calibrate=batches()).state_dict()
    written = load_torch(tmp_path / "q.pt")
    assert all(written[f"{prefix}{own}"].equal(corrected[own]) for own in corrected if own.endswith("bias"))


def test_another_model_is_refused_in_one_line(tmp_path: Path, mpq: Mpq, plan: Path) -> None:
    source = write(tmp_path, "net.pt", dict(unet().state_dict()))
    for command, target in (("apply", "q.pt"), ("compress", "q.mpq")):
        ran = mpq(command, source, plan, "--model", f"{ME}:other", "-o", tmp_path / target)
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
        assert "model: Sequential has a layer '0', which the checkpoint lacks; name its own model" in ran.err
        assert not (tmp_path / target).exists()


def test_what_a_checkpoint_holds_is_not_said_of_a_module(tmp_path: Path, mpq: Mpq, plan: Path) -> None:
    for option in (["--weights", "ema"], ["--model", f"{ME}:unet"]):
        for words in (("check", plan, f"{ME}:unet"), ("compress", f"{ME}:unet", plan, "-o", tmp_path / "x.mpq")):
            ran = mpq(*words, *option)
            assert (ran.code, ran.err.count("\n")) == (2, 1)
            assert "SOURCE is a module itself" in ran.err
    ran = mpq("plan", f"{ME}:unet", "-a", "uniform", "--bits", 4, "--weights", "ema")
    assert (ran.code, ran.err.count("\n")) == (2, 1)


def test_a_plan_of_the_bare_file_leaves_the_norm_alone(tmp_path: Path, mpq: Mpq) -> None:
    source = write(tmp_path, "net.pt", dict(unet().state_dict()))
    ran = mpq("plan", source, "-a", "uniform", "--bits", 3, "-o", tmp_path / "plan.json")
    assert "norm.weight (its bias has several dimensions, as a norm's)" in ran.err
    assert mpq("apply", source, tmp_path / "plan.json", "-o", tmp_path / "q.pt").code == 0
    assert load_torch(tmp_path / "q.pt")["norm.weight"].equal(unet().norm.weight)


def test_a_family_that_is_fused_already_is_a_note(tmp_path: Path, mpq: Mpq) -> None:
    source = write(
        tmp_path, "net.safetensors", {"attn.qkv_proj.weight": torch.randn(6, 4), "fc.weight": torch.randn(4, 4)}
    )
    ran = mpq("plan", source, "-a", "budget", "--average-bits", 4, "--tie", "qkv", "--tie", "gate_up")
    assert ran.code == 0
    for word in ("qkv", "gate_up"):
        assert f"note: tie: {word} finds no layers to tie in this model" in ran.err
