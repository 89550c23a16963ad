"""Which weights of a torch checkpoint are meant: the only ones, those that are named, or none before somebody says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mpq_plugins import Plan, Uniform, compress, decompress, find_weights, measure
from mpq_plugins.checkpoints.checkpoint import load_torch
from mpq_plugins.checkpoints.state_dicts import beside, chosen_state_dict
from mpq_plugins.errors import CompressWarning, SourceError
from mpq_plugins.simulation.checkpoint import rewrite
from tests.conftest import Ran
from tests.helpers.says import naming

HERE = Path("x.pt")


def weights(shift: float = 0.0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {"conv.weight": torch.randn(4, 3, 3, 3, generator=draw) + shift, "fc.weight": torch.randn(5, 4) + shift}


def saved(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "in.pt")
    return folder / "in.pt"


def optimizer(by_name: bool) -> dict[str, Any]:
    """As torch keeps one, by number or, for sharded training, by name."""
    state = {name if by_name else n: {"exp_avg": value, "step": torch.tensor(1.0)} for n, (name, value) in
             enumerate(weights().items())}  # fmt: skip
    return {"state": state, "param_groups": [{"lr": 0.1, "params": list(state)}]}


beside_weights = st.sampled_from([
    ("best", torch.tensor(0.9)), ("best", 0.9), ("scaler", {"scale": torch.tensor(65536.0)}), ("epoch", 3),
    ("optimizer", optimizer(False)), ("trainer", optimizer(True)), ("optim_state", {"fc.weight": torch.randn(5, 4)}),
    ("rng", torch.zeros(16, dtype=torch.uint8)), ("metrics", {"loss": torch.ones(3)}), ("args", {"lr": 1.0}),
    ("history", [{"loss": 1.0}]), ("table", torch.ones(2, 2)), ("mixup", {"lam": torch.ones(2, 2)}),
])  # fmt: skip
KEYS = st.sampled_from(["state_dict", "model_state", "generator", "net", "weights", "module", "ema"])


@given(st.lists(KEYS, max_size=3, unique=True), st.lists(beside_weights, max_size=4))
def test_weights_are_found_wherever_they_are_and_whatever_is_beside(
    keys: list[str], others: list[tuple[str, Any]]
) -> None:
    state = weights()
    content: Any = state
    for key in keys:
        content = {**dict(others), key: content}
    chosen = chosen_state_dict(content, HERE)
    assert chosen.state is state
    assert chosen.key == (".".join(reversed(keys)) or ".")
    named = beside(content, chosen)
    assert len(named) == len(keys) * len(dict(others))
    assert chosen_state_dict(content, HERE, chosen.key).state is state


def test_weights_in_a_list_are_found() -> None:
    state = weights()
    assert chosen_state_dict([3, {"model": state}], HERE).key == "1.model"


@pytest.mark.parametrize("twins", [
    {"state_dict": weights(), "state_dict_ema": weights(1)},
    {"model": weights(), "ema": {"module." + name: value for name, value in weights(1).items()}},
    {"model": weights(), "model_ema": {"model." + name: value for name, value in weights(1).items()}},
    {"model": weights(), "ema": {"shadow": weights(1), "decay": 0.999}},
    {**weights(), "ema": weights(1)},
    {"student": weights(), "teacher": weights(1)},
    {"state_dict": weights(), "extra": [weights(1)]},
], ids=range(7))  # fmt: skip
def test_two_sets_of_weights_ask_which_is_meant(tmp_path: Path, twins: dict[str, Any]) -> None:
    source = saved(tmp_path, twins)
    with pytest.raises(SourceError, match=naming("in.pt", "several", "weights=", "--weights")):
        find_weights(source)


def test_the_usual_key_is_taken_before_weights_of_another_model() -> None:
    other = {"body.weight": torch.randn(3, 3)}
    assert chosen_state_dict({"model": weights(), "discriminator": other}, HERE).key == "model"
    with pytest.raises(SourceError, match=naming("several", "'generator'", "'discriminator'")):
        chosen_state_dict({"generator": weights(), "discriminator": other}, HERE)


def test_a_key_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(SourceError, match=naming("'ema'", "'state_dict'")):
        chosen_state_dict({"state_dict": weights()}, HERE, "ema")


@pytest.mark.parametrize("key", ["state_dict", "state_dict_ema"])
def test_a_plan_says_which_weights_it_took_and_is_applied_to_them(tmp_path: Path, key: str) -> None:
    content = {"state_dict": weights(), "state_dict_ema": weights(1), "arch": "x"}
    source = saved(tmp_path, content)
    made = Uniform(bits=3)(measure(source, weights=key))
    made.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.weights == key
    rewrite(source, plan, tmp_path / "out.pt")
    out: Mapping[str, Any] = load_torch(tmp_path / "out.pt")
    for own in ("state_dict", "state_dict_ema"):
        before: dict[str, Tensor] = content[own]  # type: ignore[assignment]
        assert all(out[own][name].equal(value) != (own == key) for name, value in before.items())
    with pytest.warns(CompressWarning, match="state_dict"):
        compress(source, plan, tmp_path / "x.mpq")
    assert all(value.equal(out[key][name]) for name, value in decompress(tmp_path / "x.mpq").items())
    other = "state_dict_ema" if key == "state_dict" else "state_dict"
    rewrite(source, plan, tmp_path / "other.pt", weights=other)
    assert load_torch(tmp_path / "other.pt")[key]["fc.weight"].equal(content[key]["fc.weight"])  # type: ignore[index]


def test_weights_that_were_exported_take_the_plan_of_where_they_were(tmp_path: Path) -> None:
    plan = Uniform(bits=3)(measure(saved(tmp_path, {"state_dict": weights(), "ema": weights(1)}), weights="ema"))
    torch.save(weights(1), tmp_path / "exported.pt")
    rewrite(tmp_path / "exported.pt", plan, tmp_path / "out.pt")


def test_the_command_asks_takes_and_says(tmp_path: Path, mpq: Any) -> None:
    source = saved(tmp_path, {"state_dict": weights(), "state_dict_ema": weights(1)})
    ran: Ran = mpq("plan", source, "-a", "uniform", "--bits", 3, "-o", tmp_path / "plan.json")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "'state_dict', 'state_dict_ema'" in ran.err
    assert not (tmp_path / "plan.json").exists()
    ran = mpq("plan", source, "-a", "uniform", "--bits", 3, "--weights", "state_dict_ema", "-o", tmp_path / "plan.json")
    assert ran.code == 0
    assert "weights: those under 'state_dict_ema'" in ran.err
    ran = mpq("apply", source, tmp_path / "plan.json", "-o", tmp_path / "out.pt")
    assert ran.code == 0
    assert "weights: those under 'state_dict_ema'; others in the file are as they were" in ran.err
    assert load_torch(tmp_path / "out.pt")["state_dict"]["fc.weight"].unique().numel() == 20
    assert mpq("check", tmp_path / "plan.json", source).code == 0
    ran = mpq("plan", source, "-a", "uniform", "--bits", 3, "--weights", "nowhere")
    assert "none under 'nowhere'" in ran.err


@pytest.mark.parametrize(("content", "instead"), [
    (optimizer(False), "what an optimizer keeps, and no weights"),
    ({"trainer": optimizer(True), "epoch": 3}, "what an optimizer keeps, and no weights"),
    ([torch.ones(2, 2)], "tensors without names"),
    ({"decay": 0.9, "shadow_params": [torch.ones(2, 2)]}, "tensors without names"),
    ({"epoch": 3, "history": [1.0]}, "no tensors"),
])  # fmt: skip
def test_what_there_is_instead_of_weights_is_said(content: Any, instead: str) -> None:
    with pytest.raises(SourceError, match=rf"x\.pt: holds {instead}"):
        chosen_state_dict(content, HERE)


@pytest.mark.parametrize("key", ["opt", "opt_state", "optimizer", "exp_avg"])
def test_what_is_called_an_optimizers_is_no_second_set(key: str) -> None:
    assert chosen_state_dict({"model": weights(), key: weights(1.0)}, HERE).key == "model"
