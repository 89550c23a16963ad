"""Averaged weights beside those that they are of, in one state dict: somebody has to say which are meant."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mpq_plugins import Uniform, find_weights, measure
from mpq_plugins.errors import SourceError
from mpq_plugins.simulation.checkpoint import rewrite
from mpq_plugins.weights.averages import refuse_averages
from tests.helpers.says import naming

LAYERS = {"conv.weight": (4, 3, 3), "block.fc.weight": (5, 4)}
AVERAGES = ("ema", "ema_model", "model_ema", "model_ema.module", "swa_model", "averaged_model.module", "shadow")


def two_sets(own: str, average: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": torch.randn(shape) for prefix in (own, f"{average}.") for name, shape in LAYERS.items()}


@given(st.sampled_from(["", "model.", "net.module.", "model.diffusion_model."]), st.sampled_from(AVERAGES))
def test_two_sets_of_weights_in_one_are_asked_about(own: str, average: str) -> None:
    shapes = {name.removesuffix(".weight"): tensor.shape for name, tensor in two_sets(own, average).items()}
    with pytest.raises(SourceError, match=naming("x", "two sets", f"'{average.partition('.')[0]}.")):
        refuse_averages(shapes, "x")
    refuse_averages({name: shape for name, shape in shapes.items() if not name.startswith(average)}, "x")
    refuse_averages({name: shape for name, shape in shapes.items() if name.startswith(average)}, "x")


@pytest.mark.parametrize("other", ["teacher", "encoder_k", "generator", "schema", "G_B", "lemma"])
def test_models_of_two_equal_parts_are_one(other: str) -> None:
    refuse_averages({name.removesuffix(".weight"): own.shape for name, own in two_sets("model.", other).items()}, "x")


def test_a_part_that_is_only_called_so_is_a_layer_as_others() -> None:
    refuse_averages({"conv": (4, 3, 3), "ema.conv": (4, 4, 3), "ema.fc": (2, 2)}, "x")  # an attention of this name
    refuse_averages({"a.conv": (2, 2), "b.conv": (2, 2), "c.conv": (2, 2), "ema.conv": (2, 2)}, "x")


@pytest.mark.parametrize("said", [{"only": ["model.*"]}, {"only": ["model_ema.*"]}, {"skip": ["model_ema.*"]}])
def test_what_was_said_is_planned_and_the_other_set_is_kept(tmp_path: Path, said: dict[str, list[str]]) -> None:
    state = two_sets("model.", "model_ema.module")
    torch.save({"state_dict": state}, tmp_path / "in.pt")
    with pytest.raises(SourceError, match=r"in\.pt: holds two sets of weights"):
        find_weights(tmp_path / "in.pt")
    plan = Uniform(bits=2)(measure(tmp_path / "in.pt", bits=(2,), **said))  # type: ignore[arg-type]
    rewrite(tmp_path / "in.pt", plan, tmp_path / "out.pt")
    made = torch.load(tmp_path / "out.pt", weights_only=True)["state_dict"]
    changed = {name.partition(".")[0] for name in state if not made[name].equal(state[name])}
    assert changed == ({"model_ema"} if said == {"only": ["model_ema.*"]} else {"model"})
