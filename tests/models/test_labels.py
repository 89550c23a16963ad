"""A model's loss at labels of its own against a slow sum."""

import math

import pytest
import torch

from mpq_plugins.errors import SettingError
from mpq_plugins.models.labels import own_labels_loss


def test_it_is_the_sum_over_positions_at_drawn_labels() -> None:
    logits = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    flat = logits.reshape(6, 5)
    drawn = torch.multinomial(flat.double().softmax(1), 1, generator=torch.Generator().manual_seed(1))
    expected = sum(-math.log(float(row.double().softmax(0)[k])) for row, (k,) in zip(flat, drawn.tolist(), strict=True))
    assert float(own_labels_loss(logits, torch.Generator().manual_seed(1))) == pytest.approx(expected, rel=1e-5)


def test_what_is_all_but_certain_is_drawn() -> None:
    logits = torch.tensor([[50.0, 0.0], [0.0, 50.0]])
    assert float(own_labels_loss(logits, torch.Generator().manual_seed(0))) == pytest.approx(0.0, abs=1e-6)


def test_logits_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(SettingError, match="NaN or infinite"):
        own_labels_loss(torch.tensor([[math.nan, 0.0]]), torch.Generator().manual_seed(0))
