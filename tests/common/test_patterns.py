import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins import find_weights
from mpq_plugins.common.patterns import agreeing, families, matches
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


def test_layers_may_differ_in_several_words() -> None:
    names = [f"{block}.experts.{n}.{word}" for block in "ab" for n in range(3) for word in ("w1", "w2", "w3")]
    found = families("*.experts.{0, 1,2}.{w1,w3}", names)
    assert found == {
        (block,): tuple(name for name in names if name.startswith(f"{block}.") and not name.endswith("w2"))
        for block in "ab"
    }
    assert families("{a}.{w1,w2}.{x}", ["a.w1.x", "a.w2.x", "b.w1.x"]) == {(): ("a.w1.x", "a.w2.x")}


@given(st.lists(st.lists(words, min_size=1, max_size=3, unique=True), min_size=1, max_size=3), st.data())
def test_several_braces_are_all_their_combinations(alternatives: list[list[str]], data: st.DataObject) -> None:
    alternatives = [*alternatives, ["p", "q"]]
    names = data.draw(st.lists(st.lists(words | st.sampled_from("pq"), min_size=len(alternatives) + 1,
                                        max_size=len(alternatives) + 1).map(".".join), unique=True))  # fmt: skip
    found = families("*." + ".".join(f"{{{','.join(inside)}}}" for inside in alternatives), names)
    expected: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        head, *rest = name.split(".")
        if all(word in inside for word, inside in zip(rest, alternatives, strict=True)):
            expected.setdefault((head,), []).append(name)
    assert found == {key: tuple(members) for key, members in expected.items()}


MIXTRAL = [
    f"model.layers.{n}.block_sparse_moe.experts.{e}.{w}" for n in (0, 1) for e in range(4) for w in ("w1", "w2", "w3")
]
QWEN = [f"model.layers.{n}.mlp.experts.{e}.{w}_proj" for n in (0, 1) for e in range(4) for w in ("gate", "up", "down")]
STACKED = [
    f"model.layers.{n}.mlp.experts.{w}.{e}" for n in (0, 1) for w in ("gate_up_proj", "down_proj") for e in range(4)
]
GRANITE = [
    f"model.layers.{n}.block_sparse_moe.{w}_linear.{e}" for n in (0, 1) for w in ("input", "output") for e in range(4)
]
DBRX = [f"transformer.blocks.{n}.ffn.experts.mlp.{w}.{e}" for n in (0, 1) for w in ("w1", "v1", "w2") for e in range(4)]
OTHERS = [
    "lm_head", "model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate",
    "transformer.blocks.0.ffn.router.layer",
    "model.layers.0.mlp.shared_experts.gate_proj", "model.layers.0.mlp.shared_expert.up_proj",
    "model.layers.0.mlp.shared_expert_gate", "model.layers.0.mlp.shared_experts.0.up_proj", "expert_head.fc",
    "model.layers.0.block_sparse_moe.router.layer.0", "model.layers.0.moe.shared_linear.0", "experts",
]  # fmt: skip


@pytest.mark.parametrize(
    "names", [MIXTRAL, QWEN, STACKED, GRANITE, DBRX], ids=["mixtral", "qwen", "stacked", "granite", "dbrx"]
)
def test_all_experts_of_a_layer_are_one_family(names: list[str]) -> None:
    half = len(names) // 2
    found = families("experts", [*OTHERS[:5], *names, *OTHERS[5:]])
    assert sorted(found.values()) == [tuple(names[:half]), tuple(names[half:])]


def test_a_model_without_experts_has_no_such_family() -> None:
    assert not families("experts", OTHERS)
    assert not families("experts", ["mlp.experts.0.w1"])  # which agrees with itself


def test_families_inside_another_are_of_it_and_crossing_ones_are_refused() -> None:
    names = ["0.q_proj", "0.k_proj", "0.v_proj", "0.mlp.gate_proj", "0.mlp.up_proj", *QWEN]
    found = agreeing(["gate_up", "qkv", "experts"], names)
    half = len(QWEN) // 2
    assert set(found.values()) == {tuple(names[:3]), tuple(names[3:5]), tuple(QWEN[:half]), tuple(QWEN[half:])}
    assert all(name in family for name, family in found.items())
    assert found == agreeing(["experts", "qkv", "gate_up", "qkv"], names)
    with pytest.raises(SettingError, match=r"tie: layer 'a.1' is in two groups; give one pattern for it"):
        agreeing(["a.{0,1}", "a.{1,2}"], ["a.0", "a.1", "a.2"])


def test_gates_and_ups_of_dbrx_are_tied_expert_by_expert() -> None:
    found = set(families("gate_up", DBRX).values())
    assert found == {
        tuple(f"transformer.blocks.{n}.ffn.experts.mlp.{w}.{e}" for w in ("w1", "v1")) for n in (0, 1) for e in range(4)
    }
