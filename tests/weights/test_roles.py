"""What the layers of language models are: stacked experts, embeddings, heads and routers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from mpq_plugins import Affine, Piecewise, Uniform, find_weights, measure
from mpq_plugins.errors import SettingError, SourceError
from mpq_plugins.plans.names import are_experts
from mpq_plugins.plans.scheme import Scheme
from mpq_plugins.plans.stats import METRICS
from mpq_plugins.simulation.match import match
from mpq_plugins.weights.roles import hidden_size, inputs_first
from tests.conftest import Ran
from tests.helpers.says import naming

HIDDEN, INNER, EXPERTS = 12, 20, 3
STACK = "model.layers.0.mlp.experts"


def saved(folder: Path, state: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    """A directory with these tensors, and a config.json where one is given."""
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def names(source: Path, **options: Any) -> list[str]:
    return sorted(weight.name for weight in find_weights(source, **options))


def experts(transposed: bool, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Two stacks, and what else the block of experts has; matrices (inputs, outputs) if `transposed`."""
    draw = torch.Generator().manual_seed(0)
    up, down = (EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)
    if transposed:
        up, down = (EXPERTS, HIDDEN, 2 * INNER), (EXPERTS, INNER, HIDDEN)
    return {
        "model.embed_tokens.weight": torch.randn(7, HIDDEN, generator=draw).to(dtype),
        f"{STACK}.gate_up_proj": torch.randn(up, generator=draw).to(dtype),
        f"{STACK}.down_proj": torch.randn(down, generator=draw).to(dtype),
        f"{STACK}.gate_up_proj_bias": torch.randn(EXPERTS, 2 * INNER, generator=draw).to(dtype),
        f"{STACK}.down_proj_bias": torch.randn(EXPERTS, HIDDEN, generator=draw).to(dtype),
        "model.layers.0.mlp.gate.weight": torch.randn(EXPERTS, HIDDEN, generator=draw).to(dtype),
    }


@pytest.mark.parametrize("transposed", [False, True])
def test_a_stack_of_experts_is_a_layer_for_each(tmp_path: Path, transposed: bool) -> None:
    state = experts(transposed)
    found = find_weights(saved(tmp_path / "model", state))
    stacks = [weight for weight in found if weight.name.startswith(STACK)]
    assert {weight.name for weight in stacks} == {
        f"{STACK}.{own}.{expert}" for own in ("gate_up_proj", "down_proj") for expert in range(EXPERTS)
    }
    for weight in stacks:
        stack, _, expert = weight.name.rpartition(".")
        matrix = state[stack][int(expert)]
        assert weight.tensor().equal(matrix)
        assert (weight.kind, weight.channel_axis) == ("linear", int(transposed))
        assert weight.channels == (HIDDEN if "down" in stack else 2 * INNER)
        assert weight.rows(1, 4).equal((matrix.T if transposed else matrix)[1:4])
    reason = "its name does not end in .weight"
    assert sorted(found.left_alone) == [(f"{STACK}.{own}_proj_bias", reason) for own in ("down", "gate_up")]


@pytest.mark.parametrize("scheme", [
    Affine(granularity="per_channel"), Affine(), Affine(granularity="per_group", group_size=4),
    Piecewise(granularity="per_channel"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_an_expert_has_the_errors_of_the_same_matrix_on_its_own(
    tmp_path: Path, scheme: Scheme, dtype: torch.dtype, transposed: bool
) -> None:
    state = experts(transposed, dtype)
    alone = {
        f"{stack}.{expert}.weight": (matrix.T if transposed else matrix).contiguous()
        for stack in (f"{STACK}.gate_up_proj", f"{STACK}.down_proj")
        for expert, matrix in enumerate(state[stack])
    }
    stacked = measure(saved(tmp_path / "stacked", state), scheme, (2, 5), METRICS, per_channel=True, only=[f"{STACK}*"])
    plain = measure(saved(tmp_path / "alone", alone), scheme, (2, 5), METRICS, per_channel=True)
    expected = {layer.name: layer for layer in plain.layers}
    assert {layer.name for layer in stacked.layers} == set(expected)
    for layer in stacked.layers:
        own = expected[layer.name]
        assert layer.numel == own.numel
        np.testing.assert_array_equal(layer.channel_importance, own.channel_importance)
        for metric in METRICS:
            np.testing.assert_allclose(layer.errors[metric], own.errors[metric], rtol=1e-12)
            np.testing.assert_allclose(layer.channel_errors[metric], own.channel_errors[metric], rtol=1e-12)


def test_single_experts_can_be_skipped(tmp_path: Path) -> None:
    source = saved(tmp_path / "model", experts(False))
    found = find_weights(source, skip=[f"{STACK}.down_proj.1", "*gate_up_proj.*"])
    assert [weight.name for weight in found if STACK in weight.name] == [f"{STACK}.down_proj.{n}" for n in (0, 2)]
    assert f"{STACK}.down_proj.1" in found.skipped
    assert names(source, only=["*.gate_up_proj.2"]) == [f"{STACK}.gate_up_proj.2"]


@pytest.mark.parametrize("name", ["conv.weight", "encoder.experiment.weight", "expertise.weight", "mlp.moebius.weight"])
def test_other_tensors_of_three_dimensions_are_convolutions(tmp_path: Path, name: str) -> None:
    (weight,) = find_weights(saved(tmp_path / "model", {name: torch.randn(4, 3, 5)}))
    assert (weight.kind, weight.shape) == ("conv1d", (4, 3, 5))


def test_experts_under_a_name_of_their_own_are_found_too(tmp_path: Path) -> None:
    stack = torch.randn(2, 6, 4)
    source = saved(tmp_path / "model", {"block_sparse_moe.w1.weight": stack, "mlp.experts.w2": stack.clone()})
    assert names(source) == sorted(
        [f"block_sparse_moe.w1.{n}" for n in (0, 1)] + [f"mlp.experts.w2.{n}" for n in (0, 1)]
    )


sides = st.integers(2, 5)


@given(sides, sides, sides, st.sampled_from(["gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "input_linear"]))
def test_the_side_as_wide_as_the_hidden_state_is_the_inputs_of_what_reads_it(
    first: int, second: int, hidden: int, last: str
) -> None:
    for model_type in ("mixtral", "gpt_oss"):
        by_type = model_type == "gpt_oss"
        decided = (first == hidden) != (second == hidden)
        config = {"model_type": model_type}
        found = inputs_first(f"a.experts.{last}", (8, first, second), hidden, config)
        assert found == (first == hidden if decided else by_type)
        # What writes it has it on the other side.
        for other in ("down_proj", "w2.weight", "output_linear"):
            found = inputs_first(f"a.experts.{other}", (8, first, second), hidden, config)
            assert found == (second == hidden if decided else by_type)
        assert inputs_first("a.experts.odd", (8, first, second), hidden, config) == by_type


def test_the_hidden_size_is_the_configurations_or_the_input_embeddings() -> None:
    shapes = [("a.weight", (3, 4)), ("model.embed_tokens.weight", (100, 16))]
    assert hidden_size(shapes, {"hidden_size": 8}) == 8
    assert hidden_size(shapes, {"n_embd": 9}) == 9
    assert hidden_size(shapes, {"hidden_size": "wide"}) == 16
    assert hidden_size(shapes[:1], {}) is None


def test_the_text_models_part_of_a_configuration_counts(tmp_path: Path) -> None:
    square = {"experts.gate_up_proj": torch.randn(2, 6, 6), "experts.down_proj": torch.randn(2, 6, 6)}
    config = {"model_type": "some_vision", "text_config": {"model_type": "llama4_text", "hidden_size": 6}}
    assert {w.channel_axis for w in find_weights(saved(tmp_path / "text", square, config))} == {1}
    assert {w.channel_axis for w in find_weights(saved(tmp_path / "none", square, {"text_config": None}))} == {0}


def state_of_a_language_model() -> dict[str, Tensor]:
    layers = ("model.embed_tokens", "model.layers.0.mlp.gate", "model.layers.0.mlp.experts.5.gate_proj",
              "model.layers.0.mlp.shared_expert_gate", "model.layers.0.self_attn.q_proj")  # fmt: skip
    return {f"{name}.weight": torch.randn(1 if "shared" in name else 6, 4) for name in layers}


def test_roles_are_left_alone_on_request(tmp_path: Path) -> None:
    state = state_of_a_language_model() | {"lm_head.weight": torch.randn(6, 4)}
    source = saved(tmp_path / "model", state)
    every = {name.removesuffix(".weight") for name in state}
    small = {"model.layers.0.mlp.shared_expert_gate"}
    of_role = {
        "role:embeddings": {"model.embed_tokens"},
        "role:lm_head": {"lm_head"},
        "role:routers": {"model.layers.0.mlp.gate"} | small,
    }
    for role, own in of_role.items():
        assert set(names(source, only=[role])) == own
        found = find_weights(source, skip=[role])
        assert {weight.name for weight in found} == every - own - small
        assert set(found.skipped) == own | small
    assert names(source, skip=list(of_role)) == [
        "model.layers.0.mlp.experts.5.gate_proj", "model.layers.0.self_attn.q_proj"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"architectures": ["GemmaForCausalLM"]}, True),  # as transformers has it where nothing is said
        ({"architectures": ["GemmaForCausalLM"], "tie_word_embeddings": False}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"architectures": ["BertModel"]}, False),
        ({}, False),
        (None, False),
    ],
)
def test_the_head_is_the_input_embedding_where_the_configuration_ties_them(
    tmp_path: Path, config: dict[str, Any] | None, tied: bool
) -> None:
    source = saved(tmp_path / "model", state_of_a_language_model(), config)
    if tied:
        assert names(source, only=["role:lm_head"]) == ["model.embed_tokens"]
    else:
        with pytest.raises(SettingError, match=naming("only", "'role:lm_head'", 5)):
            find_weights(source, only=["role:lm_head"])


def test_a_head_that_is_stored_beside_what_it_is_tied_to_is_both(tmp_path: Path) -> None:
    state = state_of_a_language_model() | {"lm_head.weight": torch.randn(6, 4)}
    source = saved(tmp_path / "model", state, {"tie_word_embeddings": True})
    assert set(names(source, only=["role:lm_head"])) == {"model.embed_tokens", "lm_head"}


def test_a_head_of_its_own_counts_before_what_transformers_would_tie(tmp_path: Path) -> None:
    state = state_of_a_language_model() | {"lm_head.weight": torch.randn(6, 4)}
    for config in ({"architectures": ["SomeForCausalLM"]}, {"tie_word_embeddings": "yes"}, {"architectures": 5}):
        source = saved(tmp_path / str(len(str(config))), state, config)
        assert names(source, only=["role:lm_head"]) == ["lm_head"]


def test_gates_that_are_no_routers(tmp_path: Path) -> None:
    gates = {"attn.gate.weight": torch.randn(7, 4), "moe.experts.0.gate.weight": torch.randn(1, 4)}
    source = saved(tmp_path / "model", state_of_a_language_model() | gates)
    assert names(source, only=["role:routers"]) == ["model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate"]


@pytest.mark.parametrize(
    ("parameter", "shape"),
    [
        ("blocks.0.experts.0.conv.weight", (16, 8, 3)),
        ("moe_asr.encoder.conv1.weight", (16, 8, 3)),
        ("m.experts.gate_up_proj_scale", (2, 1, 64)),
        ("m.experts.gate_up_proj_scale_inv", (2, 4, 64)),
        ("m.experts.norm", (2, 4, 64)),
        ("m.experts.w1.bias", (2, 4, 64)),
        ("m.experts.w1.lora_A", (2, 4, 64)),
    ],
)
def test_what_is_no_stack_of_matrices(parameter: str, shape: tuple[int, ...]) -> None:
    assert not are_experts(parameter, shape)


def test_two_tensors_of_one_layer_name_are_refused(tmp_path: Path) -> None:
    state = {"m.experts.w1": torch.randn(2, 4, 4), "m.experts.w1.0.weight": torch.randn(4, 4)}
    with pytest.raises(SourceError, match=naming("'m.experts.w1.0'", "two tensors")):
        find_weights(saved(tmp_path / "model", state))


def test_a_stack_of_nothing_is_listed(tmp_path: Path) -> None:
    state = {"m.experts.w1": torch.randn(0, 4, 4), "fc.weight": torch.randn(4, 4)}
    assert find_weights(saved(tmp_path / "model", state)).left_alone == (("m.experts.w1", "a stack of no experts"),)


@pytest.mark.parametrize("name", ["output", "embed_out", "transformer.output_layer", "cls.predictions.decoder"])
def test_heads_under_other_names(tmp_path: Path, name: str) -> None:
    state = state_of_a_language_model() | {f"{name}.weight": torch.randn(6, 4)}
    assert names(saved(tmp_path / "model", state), only=["role:lm_head"]) == [name]


def test_a_gate_in_a_model_without_experts_is_no_router(tmp_path: Path) -> None:
    source = saved(tmp_path / "model", {"rnn.gate.weight": torch.randn(4, 4), "rnn.out.weight": torch.randn(4, 4)})
    with pytest.raises(SettingError, match=naming("skip", "'role:routers'", 2)):
        find_weights(source, skip=["role:routers"])


def test_a_role_that_is_not_known_is_refused_with_those_that_are(tmp_path: Path) -> None:
    source = saved(tmp_path / "model", state_of_a_language_model())
    with pytest.raises(SettingError, match=naming("role:head", "role:embeddings", "role:lm_head", "role:routers")):
        find_weights(source, skip=["role:head"])


@pytest.mark.parametrize("text", ["", "[1]", "null", '{"text_config": 3}', "\x00", "[" * 100_000])
def test_a_damaged_configuration_is_named(tmp_path: Path, text: str) -> None:
    source = saved(tmp_path / "model", state_of_a_language_model())
    (source / "config.json").write_text(text)
    assert len(find_weights(source)) == 4  # nothing is asked of it
    with pytest.raises(SourceError, match=naming("config.json", "configuration", "remove")):
        find_weights(source, skip=["role:lm_head"])


def small_model() -> dict[str, Tensor]:
    """Of each kind that is left alone by default, one; and what stands beside it."""
    shapes = {
        "encoder.block.0.SelfAttention.relative_attention_bias": (32, 4), "encoder.rel_embeddings": (16, 8),
        "language_model.layers.0.altup.correction_coefs": (4, 4), "language_model.layers.0.laurel.linear_left": (2, 8),
        "language_model.layers.0.altup.modality_router": (4, 8), "backbone.layers.0.mixer.conv1d": (8, 1, 4),
        "layers.0.linear_attn.conv1d": (8, 1, 4), "layers.0.linear_attn.in_proj_ba": (4, 8),
        "layers.0.self_attn.q_conv1d": (8, 1, 4), "mlp.shared_expert_gate": (1, 8),
        "vision_tower.vision_model.embeddings.position_embedding": (17, 8), "visual.pos_embed": (17, 8),
    }  # fmt: skip
    beside = {
        "backbone.layers.0.mixer.in_proj": (8, 8), "layers.0.linear_attn.out_proj": (8, 8),
        "layers.0.self_attn.q_proj": (8, 8), "embeddings.position_embeddings": (17, 8), "wpe": (17, 8),
        "features.conv1d": (8, 1, 4), "mixer.in_proj": (8, 8), "position_mlp": (8, 8), "mlp.gate": (4, 8),
    }  # fmt: skip
    return {f"{name}.weight": torch.randn(shape) for name, shape in (shapes | beside).items()} | {
        "fragile": torch.tensor(len(shapes))
    }


def test_small_tables_and_gates_are_left_alone_unless_they_are_asked_for(tmp_path: Path) -> None:
    state = small_model()
    count = int(state.pop("fragile"))
    source = saved(tmp_path / "model", state)
    fragile = [name.removesuffix(".weight") for name in list(state)[:count]]
    found = find_weights(source)
    assert set(found.skipped) == set(fragile)
    assert {name for name, reason in found.left_alone if reason.startswith("role:fragile, ")} == set(
        list(state)[:count]
    )
    assert names(source, only=["role:fragile"]) == sorted(fragile)
    assert names(source, only=["*"]) == sorted(name.removesuffix(".weight") for name in state)


@pytest.mark.parametrize("middle", ["lora_A.default", "lora_B", "lora_down", "lora.up", "lora_embedding_A"])
def test_adapters_are_left_alone_and_by_themselves_no_model(tmp_path: Path, middle: str) -> None:
    adapter = {f"model.q_proj.{middle}.weight": torch.randn(8, 2)}
    state = {"model.q_proj.base_layer.weight": torch.randn(8, 8)} | adapter
    found = find_weights(saved(tmp_path / "both", state))
    assert [weight.name for weight in found] == ["model.q_proj.base_layer"]
    assert found.skipped == (f"model.q_proj.{middle}",)
    assert names(tmp_path / "both", only=["role:lora"]) == [f"model.q_proj.{middle}"]
    with pytest.raises(SourceError, match=naming(f"'model.q_proj.{middle}.weight'", "role:lora", "merge")):
        find_weights(saved(tmp_path / "adapter", adapter))


def test_what_is_left_alone_by_default_is_no_layer_that_a_plan_lacks(tmp_path: Path) -> None:
    state = {"relative_attention_bias.weight": torch.randn(32, 4), "q.weight": torch.randn(4, 4)}
    module = nn.ModuleDict({"relative_attention_bias": nn.Embedding(32, 4), "q": nn.Linear(4, 4, bias=False)})
    module.load_state_dict(state)
    source = saved(tmp_path / "model", state)
    of_file, of_module = (Uniform(bits=4)(measure(own, bits=(4,))) for own in (source, module))
    assert [layer.name for layer in of_file.layers] == ["q"]
    assert len(of_module.layers) == 2
    for plan in (of_file, of_module):
        for where in (source, module):
            assert match(plan, where, weights=True).problems == ()


def test_the_command_lists_what_was_left_alone(tmp_path: Path, mpq: Callable[..., Ran]) -> None:
    state = {"q.weight": torch.randn(4, 4), "q.lora_A.weight": torch.randn(2, 4), "norm.weight": torch.randn(2, 2)}
    source = saved(tmp_path / "model", state)
    ran = mpq("plan", source, "-a", "uniform", "--bits", 4)
    assert "left alone by default: q.lora_A.weight (role:lora, " in ran.err
    assert "left alone, no quantizable layer: norm.weight (a norm, by its name)" in ran.err
    assert "skipped on request" not in ran.err
    made = json.loads(mpq("plan", source, "-a", "uniform", "--bits", 4, "--json").out)
    assert made["skipped"] == ["q.lora_A"]
    assert set(made["left_alone"]) == {"q.lora_A.weight", "norm.weight"}
    ran = mpq("plan", source, "-a", "uniform", "--bits", 4, "--skip", "role:lora")
    assert "skipped on request: 1 layer\n" in ran.err


def test_an_adapter_alone_is_refused_in_one_line(tmp_path: Path, mpq: Callable[..., Ran]) -> None:
    (tmp_path / "adapter").mkdir()
    save_file({"q.lora_A.weight": torch.randn(2, 4)}, tmp_path / "adapter" / "adapter_model.safetensors")
    ran = mpq("plan", tmp_path / "adapter", "-a", "uniform", "--bits", 4)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "role:lora" in ran.err
