"""Sets of channels behave as the tuples they stand for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins.plans.channels import MOST_CHANNELS, Channels, cover, joined

sets = st.sets(st.integers(0, 40)).map(lambda own: tuple(sorted(own)))


@given(sets, st.integers(-45, 45))
def test_they_are_the_tuple_of_their_channels(own: tuple[int, ...], k: int) -> None:
    channels = Channels.of(own)
    assert (len(channels), list(channels), tuple(channels)) == (len(own), list(own), own)
    assert channels == own
    assert own == channels
    assert hash(channels) == hash(own)
    assert channels == Channels.of(list(own)) == Channels.of(np.array(own, int))
    assert channels.array().tolist() == list(own)
    assert channels[1:5:2] == own[1:5:2]
    assert (k in channels) == (k in own)
    if -len(own) <= k < len(own):
        assert channels[k] == own[k]
    if own:
        assert Channels.of(str(channels)) == channels
        assert channels != own[:-1]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_parts_that_cover_are_found_and_join_again(owners: list[int]) -> None:
    parts = [Channels.of([c for c, own in enumerate(owners) if own == part]) for part in range(4)]
    kept = [part for part in parts if part]
    assert cover(kept, len(owners))
    assert not cover(kept, len(owners) + 1)
    assert not cover([*kept, kept[0]], len(owners))
    assert not cover([*kept, kept[0]], len(owners) + len(kept[0]))
    assert joined(kept) == tuple(range(len(owners)))


@pytest.mark.parametrize(
    "text",
    ["", ",", "0-", "-1", "1,0", "0,0", "0-3,3", "3-2", "0,,1", "0-2,", " 1", "1 ", "٣", "0-٣", "²", "1_0", "+1", "0x1",
     str(MOST_CHANNELS), f"0-{MOST_CHANNELS}", "9" * 5000, "0-1-2"],
)  # fmt: skip
def test_texts_that_are_no_runs_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no channel or run of channels that ascend"):
        Channels.of(text)


@pytest.mark.parametrize("values", [[1, 0], [0, 0], [-1, 0], [0.5], [True], ["0"], [[0]], [0, MOST_CHANNELS]])
def test_values_that_do_not_ascend_are_refused(values: list[int]) -> None:
    with pytest.raises(ValueError, match="is no list of channels that ascend"):
        Channels.of(values)
