from typing import Any

import pytest
import torch

from mpq_plugins import Affine, Plan, Uniform, measure, round_weights
from mpq_plugins.errors import SettingError
from mpq_plugins.reconstruction.rounding import Rounding
from tests.adapters.compressor import same
from tests.helpers.nets import conv_net

fitting = pytest.importorskip("mpq_plugins.adapters.shared.fitting")
BATCHES = list(torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(8))


def planned() -> Plan:
    return Uniform(bits=3)(measure(conv_net(), Affine(granularity="per_channel"), (3,)))


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_within_the_block_models_are_rounded_on_its_inputs(rounding: Rounding) -> None:
    model, plan = conv_net(), planned()
    with fitting.rounding_on(iter(BATCHES), rounding):
        for _ in range(2):  # several trials, of one iterator
            assert same(fitting.fitted(model, plan), round_weights(model, plan, BATCHES, rounding))
    assert fitting.fitted(model, plan) is model


def test_blocks_are_nested_and_end_where_they_are_left() -> None:
    model, plan = conv_net(), planned()
    with fitting.rounding_on(BATCHES, "nearest"):
        with fitting.rounding_on(None, None):
            assert fitting.fitted(model, plan) is model
        assert fitting.fitted(model, plan) is not model
        with pytest.raises(KeyError), fitting.rounding_on(BATCHES, None):
            raise KeyError
        assert same(fitting.fitted(model, plan), round_weights(model, plan, BATCHES, "nearest"))


@pytest.mark.parametrize(
    ("batches", "rounding", "said"),
    [
        (None, "compensated", "needs calibration inputs"),
        (BATCHES, "best", "nearest, compensated, learned"),
        ([], None, "batches: none given"),
        (BATCHES[0], None, "a single tensor is one batch"),
    ],
)
def test_bad_input_is_refused(batches: Any, rounding: Any, said: str) -> None:
    with pytest.raises(SettingError, match=said), fitting.rounding_on(batches, rounding):
        pytest.fail("got in")
    assert fitting.fitted(model := conv_net(), planned()) is model
