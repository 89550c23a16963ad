"""The tests' own way to look for facts in a message."""

import pytest

from tests.helpers.says import names, naming


@pytest.mark.parametrize("facts", [("conv1", 3), (3, "conv1"), ("(4, 8)",), ("legalise(plan)", "3"), ("'conv1'",)])
def test_facts_in_any_order(facts: tuple[object, ...]) -> None:
    assert names("layer 'conv1': 3 bits,\nbut it runs (4, 8). Use legalise(plan).", *facts)


@pytest.mark.parametrize("facts", [("conv",), (8,), ("bit",), ("conv1", "conv2")])
def test_a_piece_of_a_name_or_number_is_none(facts: tuple[object, ...]) -> None:
    assert not names("layer 'conv1': 18 bits", *facts)


def test_it_is_what_match_takes() -> None:
    with pytest.raises(ValueError, match=naming("a*", 3)):
        raise ValueError("3 of a* are wrong")
