import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins import find_weights
from mpq_plugins.common.patterns import families, matches
from mpq_plugins.errors import SettingError
from tests.helpers.nets import conv_net, tied_net
from tests.helpers.says import naming

words = st.text("abc", min_size=1, max_size=3)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layer1.*", "layer1.0.conv1", True),
        ("layer1.*", "layer10.conv1", False),
        ("*.conv?", "layer1.0.conv2", True),
        ("layer[12].fc", "layer2.fc", True),
        ("layer[12].fc", "layer3.fc", False),
        ("conv1", "Conv1", False),
        ("conv1", "conv10", False),
        (r"re:layer[12]\.\d+\.conv1", "layer2.13.conv1", True),
        (r"re:layer[12]\.\d+\.conv1", "layer2.13.conv11", False),
        (r"re:layer", "layer1", False),
        (r"re:(?i)CONV\d", "conv1", True),
        ("re:", "", True),
        ("re:.*", "anything", True),
    ],
)
def test_globs_and_regular_expressions_name_whole_layers(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


@pytest.mark.parametrize("pattern", ["re:(", "re:[a", "re:*"])
def test_a_broken_regular_expression_is_refused(pattern: str) -> None:
    with pytest.raises(SettingError, match=r"no regular expression .*write re:layer") as caught:
        matches(pattern, "conv1")
    assert repr(pattern) in str(caught.value)


def test_layers_that_differ_in_one_word_are_a_family() -> None:
    names = [f"block.{i}.{word}" for i in range(2) for word in ("query", "key", "value", "out")]
    assert families("*.{query,key,value}", ["head", *names, "query"]) == {
        ("block.0",): ("block.0.query", "block.0.key", "block.0.value"),
        ("block.1",): ("block.1.query", "block.1.key", "block.1.value"),
    }


def test_the_rest_of_a_family_is_taken_literally() -> None:
    assert families("a.{x, y}", ["axx", "a.x", "a.y", "a.xy"]) == {(): ("a.x", "a.y")}
    assert families("{up,down}_proj", ["down_proj", "up_proj"]) == {(): ("down_proj", "up_proj")}
    assert families("*.{a,b}.*", ["0.a.1", "0.b.1", "0.b.2", "1.a.1"]) == {
        ("0", "1"): ("0.a.1", "0.b.1"),
        ("0", "2"): ("0.b.2",),
        ("1", "1"): ("1.a.1",),
    }
    assert families("x.{a,b}", ["y.a"]) == {}


@given(st.lists(words, min_size=1, max_size=8), st.lists(words, min_size=2, max_size=3, unique=True))
def test_a_layer_is_in_one_family_at_most(heads: list[str], alternatives: list[str]) -> None:
    names = list(dict.fromkeys(f"{head}.{word}" for head in heads for word in alternatives))
    found = families(f"*.{{{','.join(alternatives)}}}", names)
    assert sorted(name for own in found.values() for name in own) == sorted(names)
    for (head,), own in found.items():
        assert sorted(own) == sorted(f"{head}.{word}" for word in alternatives)
        assert list(own) == [name for name in names if name in own]


@pytest.mark.parametrize("pattern", ["*.query", "*.{query}", "}a,b{", "a,b", "{a,b", ""])
def test_a_family_needs_alternatives(pattern: str) -> None:
    with pytest.raises(SettingError, match=naming("'*.{query,key,value}'")) as caught:
        families(pattern, ["0.query"])
    assert repr(pattern) in str(caught.value)


def test_weights_are_skipped_and_chosen_by_regular_expression() -> None:
    assert [w.name for w in find_weights(conv_net(), skip=[r"re:conv\d"])] == ["up", "fc"]
    chosen = find_weights(conv_net(), only=[r"re:conv\d|fc"], skip=["re:.*2"])
    assert [w.name for w in chosen] == ["conv1", "fc"]
    assert chosen.skipped == ("conv2", "up")
    assert find_weights(tied_net(), skip=["re:lm_.*"]).skipped == ("embed",)


@pytest.mark.parametrize("option", ["skip", "only"])
def test_a_regular_expression_that_matches_nothing_is_refused(option: str) -> None:
    with pytest.raises(SettingError, match=naming(option, "'re:conv'", 4)):
        find_weights(conv_net(), **{option: ["re:conv"]})  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="no regular expression"):
        find_weights(conv_net(), **{option: ["re:conv("]})  # type: ignore[arg-type]


@pytest.mark.parametrize("words", [
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("wq", "wk", "wv"),
    ("to_q", "to_k", "to_v"), ("q", "k", "v"),
])  # fmt: skip
def test_queries_keys_and_values_are_a_family_under_their_usual_names(words: tuple[str, ...]) -> None:
    names = [f"block.{n}.attn.{word}" for n in range(2) for word in (*words, "o_proj")]
    found = families("qkv", ["embed", *names, "lone.q_proj"])
    assert sorted(found.values()) == [tuple(f"block.{n}.attn.{word}" for word in words) for n in range(2)]


@pytest.mark.parametrize("words", [("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1")])
def test_gates_and_ups_are_a_family_under_their_usual_names(words: tuple[str, str]) -> None:
    names = [f"block.{n}.mlp.{word}" for n in range(2) for word in (*words, "down_proj", "w2")]
    found = families("gate_up", names)
    assert sorted(found.values()) == [tuple(f"block.{n}.mlp.{word}" for word in words) for n in range(2)]


def test_each_expert_is_a_family_of_its_own() -> None:
    stacked = [f"mlp.experts.{word}.{n}" for word in ("gate_proj", "up_proj", "down_proj") for n in range(3)]
    single = [f"moe.experts.{n}.{word}" for n in range(2) for word in ("w1", "w2", "w3")]
    found = set(families("gate_up", stacked + single).values())
    assert found == {(f"mlp.experts.gate_proj.{n}", f"mlp.experts.up_proj.{n}") for n in range(3)} | {
        (f"moe.experts.{n}.w1", f"moe.experts.{n}.w3") for n in range(2)
    }


@given(st.lists(st.tuples(words, st.sampled_from([*"qkv", "q_proj", "k_proj", "to_q", "to_v", "wk", "out"]))))
def test_no_layer_is_in_two_families_of_what_is_fused(parts: list[tuple[str, str]]) -> None:
    names = list(dict.fromkeys(f"{head}.{word}" for head, word in parts))
    found = families("qkv", names)
    members = [name for own in found.values() for name in own]
    assert len(members) == len(set(members))
    for own in found.values():
        assert len(own) > 1
        assert len({name.partition(".")[0] for name in own}) == 1
        assert not any(name.endswith(".out") for name in own)
