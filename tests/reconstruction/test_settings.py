"""Settings: each bad value is one SettingError that names its argument, before any work."""

import math
from typing import Any

import pytest
import torch
from torch import nn

import mpq_plugins as mpq
from mpq_plugins import SettingError
from mpq_plugins.reconstruction.settings import Settings, usual_lr

GOOD: dict[str, Any] = {
    "blocks": (), "steps": 5, "batch_size": 8, "lr": 0.01, "loss": "mse", "regulariser": 0.01, "mix": 0.0,
    "correct": False, "tune": "rounding", "seed": 0,
}  # fmt: skip
INTEGERS: list[Any] = [-1, 1.0, 1.5, True, "3", None, 1 << 63, 10**30, math.nan]
NUMBERS: list[Any] = [-0.1, math.inf, -math.inf, math.nan, True, "0.1", None, 1j, torch.tensor([0.1, 0.2]), 10**400]
BAD: list[tuple[str, Any]] = [
    *(("steps", value) for value in [0, *INTEGERS]),
    *(("batch_size", value) for value in [0, *INTEGERS]),
    *(("seed", value) for value in INTEGERS),
    *(("lr", value) for value in [0, 0.0, *NUMBERS]),
    *(("regulariser", value) for value in NUMBERS),
    *(("mix", value) for value in [1.0001, 2, *NUMBERS]),
    *(("loss", value) for value in ["MSE", "", None, 1, ["mse"], "kl"]),
    *(("tune", value) for value in ["norm", "", None, True, "all"]),
    *(("correct", value) for value in [1, 0, None, "yes", "False"]),
    *(("blocks", value) for value in [("",), (1,), (None,), ("layer1", "")]),
]


def named(case: Any) -> str:
    return case if isinstance(case, str) and case in GOOD else repr(case)[:20]


@pytest.mark.parametrize(("name", "value"), BAD, ids=named)
def test_a_bad_value_is_one_error_that_names_its_argument(name: str, value: Any) -> None:
    with pytest.raises(SettingError, match=rf"^{name}: ") as said:
        Settings(**GOOD | {name: value})
    assert "is not allowed; " in str(said.value)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 1}, {"batch_size": 1}, {"seed": 0}, {"seed": (1 << 63) - 1}, {"lr": 1e-9}, {"lr": 1}, {"lr": 1e300},
        {"regulariser": 0}, {"regulariser": 0.0}, {"mix": 0}, {"mix": 1}, {"mix": 1.0}, {"loss": "fisher"},
        {"tune": "norms"}, {"correct": True}, {"blocks": ("layer?.*", "re:x")},
    ],
    ids=str,
)  # fmt: skip
def test_the_ends_of_what_is_allowed_are_allowed(changes: dict[str, Any]) -> None:
    settings = Settings(**GOOD | changes)
    assert all(getattr(settings, name) == value for name, value in changes.items())


@pytest.mark.parametrize(
    ("name", "value"),
    [("blocks", None), ("blocks", 5), ("blocks", [3]), ("blocks", ""), ("steps", 0), ("memory", 1.5), ("memory", True)],
    ids=named,
)
def test_reconstruct_says_so_before_it_looks_at_anything(name: str, value: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 4)).eval()
    plan = mpq.Uniform(bits=2)(mpq.measure(net, bits=(2,)))
    given: dict[str, Any] = {"steps": 1, name: value}
    with pytest.raises(SettingError, match=rf"^{name}: .* is not allowed"):
        mpq.reconstruct(net, plan, [torch.zeros(2, 5)], **given)


def test_one_pattern_may_be_given_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4)).eval()
    plan = mpq.Uniform(bits=2)(mpq.measure(net, bits=(2,)))
    for blocks in ("0", ["0"], ("0",)):
        reports: list[mpq.BlockReport] = []
        mpq.reconstruct(net, plan, [torch.randn(8, 4)], steps=1, blocks=blocks, finished=reports.append)
        assert [report.name for report in reports] == ["0", "1"]


@pytest.mark.parametrize(("steps", "lr"), [(20_000, 0.001), (2_000, 0.003), (500, 0.012), (10, 0.02)])
def test_fewer_steps_are_longer_ones(steps: int, lr: float) -> None:
    assert usual_lr(steps) == pytest.approx(lr)
