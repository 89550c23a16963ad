"""`size`: bytes of the whole model, of which the planned layers get what the rest leaves."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpq_plugins import Affine, Budget, SettingError, measure
from tests.allocation.test_budget import SHAPES, seeded
from tests.helpers.nets import conv_net
from tests.helpers.says import naming

SCHEME = Affine(granularity="per_channel")


@given(st.integers(0, 10**7), st.integers(2600, 8000), st.booleans())
def test_it_is_size_bytes_and_the_rest(rest: int, planned: int, parts: bool) -> None:
    table = dataclasses.replace(seeded(SHAPES), rest_bytes=rest)
    known = Budget(size_bytes=planned, parts=parts, bits=(2, 4, 8)).solve(table)
    whole = Budget(size=planned + rest, parts=parts, bits=(2, 4, 8)).solve(table)
    assert whole.plan.layers == known.plan.layers
    assert (whole.objective, whole.gap) == (known.objective, known.gap)
    used, asked = whole.used["size"]
    assert asked == planned + rest
    assert used == pytest.approx(known.used["size_bytes"][0] + rest)
    assert whole.plan.size().model_bytes == known.plan.size().total_bytes + rest <= asked


def test_an_amount_in_words_is_the_number() -> None:
    assert Budget(size="1.5MiB") == Budget(size=1572864)
    assert Budget(size="90 kB").size == 90000


def test_the_model_is_no_larger_than_asked_with_layers_skipped_and_pinned(tmp_path: Path) -> None:
    net = conv_net()
    table = measure(net, SCHEME, range(1, 9), per_channel=True, skip=["conv1"])
    everything = sum(value.numel() * value.element_size() for value in net.state_dict().values())
    least = Budget(average_bits=16, bits=(1,), pin=("fc=16",))(table).size().model_bytes
    assert least is not None
    for asked in range(least, everything, 500):
        plan = Budget(size=asked, pin=("fc=16",))(table)
        size = plan.size()
        assert plan.by_name["fc"].bits == 16
        assert size.model_bytes is not None
        assert size.model_bytes <= asked
        # By hand: what is not planned as it is stored, and what is as the plan has it.
        planned = {f"{name}.weight" for name in plan.by_name}
        kept = sum(v.numel() * v.element_size() for name, v in net.state_dict().items() if name not in planned)
        assert size.model_bytes == kept + -(-size.total_bits // 8)


def test_what_cannot_be_met_is_said_in_bytes_of_the_model() -> None:
    table = dataclasses.replace(seeded(SHAPES), rest_bytes=10_000)
    least = Budget(average_bits=2, bits=(2,))(table).size().total_bytes
    with pytest.raises(
        SettingError, match=naming("size", "5,000", f"the least is {least + 10_000:,}", f"{least + 5000:,} more")
    ):
        Budget(size=5000, bits=(2, 4))(table)


def test_a_table_that_does_not_tell_ends_with_the_command() -> None:
    with pytest.raises(SettingError, match=r"size: .*mpq measure SOURCE -o TABLE$"):
        Budget(size="9MB")(seeded(SHAPES))


@pytest.mark.parametrize("value", ["9", "9 potatoes", "", 0, -1, True, 1.5])
def test_other_words_are_refused_by_name(value: object) -> None:
    if value == "9":
        assert Budget(size=value).size == 9
        return
    if value == 1.5:
        assert Budget(size=value).size == 1  # type: ignore[arg-type]
        return
    with pytest.raises(SettingError, match=naming("size", repr(value), "9MB")):
        Budget(size=value)  # type: ignore[arg-type]


def test_a_plan_of_a_module_tells_its_whole_size(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    plan = Budget(size="1kB")(measure(net, SCHEME, range(1, 9), per_channel=True))
    plan.save(tmp_path / "plan.json")
    assert plan.rest_bytes == sum(
        value.numel() * value.element_size() for name, value in net.state_dict().items() if name != "0.weight"
    )
    assert type(plan).load(tmp_path / "plan.json").size() == plan.size()
    assert torch.tensor(plan.size().model_bytes) <= 1000
