"""What of real architectures' checkpoints is planned, left alone or refused: a row for each, of small tensors."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mpq_plugins import Affine, MPQError, Plan, Uniform, find_weights, measure
from mpq_plugins.errors import MeasureWarning, SettingError, SourceError, WeightError
from mpq_plugins.simulation.checkpoint import rewrite
from mpq_plugins.simulation.match import match

HIDDEN, INNER, WORDS = 16, 32, 24
State = dict[str, Tensor]
Shapes = Mapping[str, Sequence[int]]
PER_CHANNEL = Affine(granularity="per_channel")
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN}


def of(shapes: Shapes, dtype: torch.dtype = torch.bfloat16) -> State:
    draw = torch.Generator().manual_seed(len(shapes))
    return {name: (torch.randn(*shape, generator=draw) / 20).to(dtype) for name, shape in shapes.items()}


def integers(shapes: Shapes, dtype: torch.dtype = torch.int32) -> State:
    return {name: torch.full(tuple(shape), 3, dtype=dtype) for name, shape in shapes.items()}


def weights(prefix: str, **shapes: Sequence[int]) -> Shapes:
    return {f"{prefix}.{name.replace('__', '.')}.weight": shape for name, shape in shapes.items()}


ATTENTION = {f"self_attn__{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
MLP = {"mlp__gate_proj": (INNER, HIDDEN), "mlp__up_proj": (INNER, HIDDEN), "mlp__down_proj": (HIDDEN, INNER)}
NORMS = {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
BLOCK = "model.layers.0"
EMBED, HEAD = {"model.embed_tokens.weight": (WORDS, HIDDEN)}, {"lm_head.weight": (WORDS, HIDDEN)}
TEXT = {**EMBED, **HEAD, "model.norm.weight": (HIDDEN,), **weights(BLOCK, **NORMS)}
LLAMA_SHAPES = {**TEXT, **weights(BLOCK, **ATTENTION, **MLP)}
LLAMA_LAYERS = 9


def llama(**changed: Tensor | None) -> State:
    """A Llama of one block; changed: by name, with __ for dots and without its prefix; None for what it lacks."""
    state = of(LLAMA_SHAPES)
    for name, value in changed.items():
        full = name.replace("__", ".")
        state.pop(full, None)
        if value is not None:
            state[full] = value
    return state


def experts(holder: str, words: Shapes, count: int = 4) -> Shapes:
    return {f"{holder}.{e}.{word}.weight": shape for e in range(count) for word, shape in words.items()}


@dataclass(frozen=True)
class Row:
    """layers: how many are planned; inputs_first: which have their outputs along axis 1; by_default: role -> the last
    words of what is left alone because of it; kinds: of some layers, by the last word of their names; others: listed
    parameters that are no layers; warns: what measuring says."""

    state: Callable[[], State]
    layers: int
    config: Mapping[str, Any] | None = None
    file: str = "model.safetensors"
    inputs_first: tuple[str, ...] = ()
    by_default: Mapping[str, tuple[str, ...]] | None = None
    kinds: Mapping[str, str] | None = None
    others: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    scheme: Affine = PER_CHANNEL
    warns: str = ""


def moe(holder: str, router: str, words: Shapes) -> Shapes:
    return {**TEXT, **weights(BLOCK, **ATTENTION), f"{router}.weight": (4, HIDDEN), **experts(holder, words)}


W123 = {"w1": (INNER, HIDDEN), "w2": (HIDDEN, INNER), "w3": (INNER, HIDDEN)}
PROJECTIONS = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}


def gpt_oss() -> State:
    stacks = {
        "gate_up_proj": (4, HIDDEN, 2 * INNER),
        "gate_up_proj_bias": (4, 2 * INNER),
        "down_proj": (4, INNER, HIDDEN),
    }
    inside = {f"{BLOCK}.mlp.experts.{name}": shape for name, shape in stacks.items()}
    return of({**TEXT, **weights(BLOCK, **ATTENTION, mlp__router=(4, HIDDEN)), **inside, f"{BLOCK}.sinks": (4,)})


def gpt2() -> State:
    inside = weights("h.0", attn__c_attn=(HIDDEN, 3 * HIDDEN), attn__c_proj=(HIDDEN, HIDDEN), mlp__c_fc=(HIDDEN, 64))
    return of({"wte.weight": (WORDS, HIDDEN), "wpe.weight": (32, HIDDEN), "h.0.attn.bias": (1, 1, 4, 4), **inside})


def gpt_neox() -> State:
    inside = weights("gpt_neox.layers.0.attention", query_key_value=(48, HIDDEN), dense=(HIDDEN, HIDDEN))
    return of({"gpt_neox.embed_in.weight": (WORDS, HIDDEN), "embed_out.weight": (WORDS, HIDDEN), **inside})


def eight_bits(scale: str, shape: Sequence[int]) -> State:
    state = of({**TEXT, **weights(BLOCK, **ATTENTION)})
    for name in (name for name in [*state] if name.startswith(f"{BLOCK}.self_attn")):
        state[name] = state[name].to(torch.float8_e4m3fn)
        state[f"{name.removesuffix('weight')}{scale}"] = torch.ones(tuple(shape))
    return state


def gemma3n() -> State:
    table = {
        "altup__correction_coefs": (4, 4),
        "altup__modality_router": (4, HIDDEN),
        "laurel__linear_left": (8, HIDDEN),
    }
    return of({**LLAMA_SHAPES, **weights(BLOCK, **table, per_layer_projection=(HIDDEN, 8))})


def mamba() -> State:
    block = "backbone.layers.0.mixer"
    inside = weights(
        block, in_proj=(64, HIDDEN), conv1d=(32, 1, 4), x_proj=(36, 32), dt_proj=(32, 4), out_proj=(HIDDEN, 32)
    )
    return of({"backbone.embeddings.weight": (WORDS, HIDDEN), **inside, f"{block}.A_log": (32, 8), f"{block}.D": (32,)})


def qwen3_next() -> State:
    inside = weights(
        f"{BLOCK}.linear_attn",
        conv1d=(32, 1, 4),
        in_proj_qkvz=(64, HIDDEN),
        in_proj_ba=(8, HIDDEN),
        out_proj=(HIDDEN, 32),
    )
    gates = weights(f"{BLOCK}.mlp", shared_expert_gate=(1, HIDDEN), gate=(4, HIDDEN))
    return of({**TEXT, **inside, **gates, **experts(f"{BLOCK}.mlp.experts", PROJECTIONS)})


def llava() -> State:
    vision = "vision_tower.vision_model.embeddings"
    inside = {
        f"{vision}.patch_embedding.weight": (HIDDEN, 3, 4, 4),
        f"{vision}.position_embedding.weight": (17, HIDDEN),
    }
    return of({**{f"language_model.{name}": shape for name, shape in LLAMA_SHAPES.items()}, **inside})


def t5() -> State:
    block = "encoder.block.0.layer.0.SelfAttention"
    inside = {f"{block}.{name}.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
    return of({"shared.weight": (WORDS, HIDDEN), **inside, f"{block}.relative_attention_bias.weight": (32, 4)})


def lora() -> State:
    state, name = llama(), f"{BLOCK}.self_attn.q_proj"
    state[f"{name}.base_layer.weight"] = state.pop(f"{name}.weight")
    return state | of(weights(name, lora_A__default=(4, HIDDEN), lora_B__default=(HIDDEN, 4)))


def dbrx() -> State:
    block = "transformer.blocks.0.ffn"
    inside = {f"{block}.experts.mlp.{name}": (4 * INNER, HIDDEN) for name in ("w1", "v1", "w2")}
    return of(
        {"transformer.wte.weight": (WORDS, HIDDEN), **HEAD, **inside, f"{block}.router.layer.weight": (4, HIDDEN)}
    )


def with_scale(dtype: torch.dtype) -> State:
    return {**llama(), f"{BLOCK}.mlp.down_proj.weight_scale": torch.ones(HIDDEN, 4).to(dtype)}


HEADLESS = {"lm_head__weight": None}
FRAGILE = "role:fragile"
ROWS = {
    "llama": Row(llama, LLAMA_LAYERS, LLAMA),
    "head tied and absent": Row(lambda: llama(**HEADLESS), LLAMA_LAYERS - 1, {**LLAMA, "tie_word_embeddings": True}),
    "head tied and a copy": Row(
        lambda: llama(lm_head__weight=llama()["model.embed_tokens.weight"].clone()), LLAMA_LAYERS - 1,
        {**LLAMA, "tie_word_embeddings": True}, tied=("lm_head",),
    ),
    "reward head": Row(lambda: {**llama(**HEADLESS), **of({"score.weight": (1, HIDDEN)})}, LLAMA_LAYERS, LLAMA),
    "phi-3, fused": Row(
        lambda: of({**TEXT, **weights(BLOCK, self_attn__qkv_proj=(48, HIDDEN), mlp__gate_up_proj=(64, HIDDEN))}), 4,
    ),
    "gpt-neox": Row(gpt_neox, 4, {"model_type": "gpt_neox"}, kinds={"embed_in": "embedding", "embed_out": "linear"}),
    "gpt-2": Row(
        gpt2, 5, {"model_type": "gpt2"}, inputs_first=("c_attn", "c_proj", "c_fc"), kinds={"wpe": "embedding"},
        others=("h.0.attn.bias",),
    ),
    "mixtral": Row(
        lambda: of(moe(f"{BLOCK}.block_sparse_moe.experts", f"{BLOCK}.block_sparse_moe.gate", W123)), 6 + 1 + 12,
        {"model_type": "mixtral", "num_local_experts": 4},
    ),
    "qwen-3 moe": Row(lambda: of(moe(f"{BLOCK}.mlp.experts", f"{BLOCK}.mlp.gate", PROJECTIONS)), 6 + 1 + 12),
    "gpt-oss": Row(
        gpt_oss, 6 + 1 + 8, {"model_type": "gpt_oss", "hidden_size": HIDDEN},
        others=(f"{BLOCK}.mlp.experts.gate_up_proj_bias",),
        inputs_first=("gate_up_proj.0", "gate_up_proj.1", "gate_up_proj.2", "gate_up_proj.3", "down_proj.0",
                      "down_proj.1", "down_proj.2", "down_proj.3"),
    ),
    "dbrx": Row(
        dbrx, 3 + 12, {"model_type": "dbrx"}, inputs_first=tuple(f"w2.{expert}" for expert in range(4)),
        kinds={"wte": "embedding"},
    ),
    "fp8 in blocks": Row(lambda: eight_bits("weight_scale_inv", (1, 1)), 6),
    "fp8 by output": Row(lambda: eight_bits("weight_scale", (HIDDEN, 1)), 6),
    "gemma-3n": Row(
        gemma3n, LLAMA_LAYERS + 1, by_default={FRAGILE: ("correction_coefs", "modality_router", "linear_left")},
    ),
    "mamba": Row(mamba, 5, by_default={FRAGILE: ("conv1d",)}, others=("backbone.layers.0.mixer.A_log",)),
    "qwen-3 next": Row(
        qwen3_next, 2 + 2 + 1 + 12, by_default={FRAGILE: ("conv1d", "in_proj_ba", "shared_expert_gate")},
    ),
    "llava": Row(
        llava, LLAMA_LAYERS + 1, by_default={FRAGILE: ("position_embedding",)}, kinds={"patch_embedding": "conv2d"},
    ),
    "t5": Row(t5, 5, by_default={FRAGILE: ("relative_attention_bias",)}, kinds={"shared": "embedding"}),
    "adapters not merged": Row(lora, LLAMA_LAYERS, by_default={"role:lora": ("lora_A.default", "lora_B.default")}),
    "a scale of e8m0": Row(
        lambda: with_scale(torch.float8_e8m0fnu), LLAMA_LAYERS, others=(f"{BLOCK}.mlp.down_proj.weight_scale",),
    ),
    "a complex table": Row(
        lambda: {**llama(), "freqs.weight": torch.ones(4, 4, dtype=torch.complex64)}, LLAMA_LAYERS,
        others=("freqs.weight",),
    ),
    "one .bin": Row(llama, LLAMA_LAYERS, file="pytorch_model.bin"),
    "consolidated": Row(llama, LLAMA_LAYERS, file="consolidated.safetensors"),
    "a variant": Row(llama, LLAMA_LAYERS, file="model.fp16.safetensors"),
    "diffusers": Row(
        lambda: of({"conv_in.weight": (8, 4, 3, 3), "down.0.attn1.to_q.weight": (8, 8)}), 2,
        file="diffusion_pytorch_model.safetensors", kinds={"conv_in": "conv2d"},
    ),
    "zero rows": Row(lambda: llama(lm_head__weight=torch.zeros(WORDS, HIDDEN)), LLAMA_LAYERS),
    "groups that do not divide": Row(
        lambda: of({"wte.weight": (WORDS, 64), **weights(BLOCK, mlp__down_proj=(16, 96), mlp__fc2=(16, 40))}), 3,
        scheme=Affine(granularity="per_group", group_size=64), warns="down_proj' (96 inputs, groups of 32)",
    ),
}  # fmt: skip


def saved(folder: Path, state: State, config: Mapping[str, Any] | None, file: str = "model.safetensors") -> Path:
    folder.mkdir()
    if file.endswith(".safetensors"):
        save_file(state, folder / file)
    else:
        torch.save(state, folder / file)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def plan_of(source: Path, scheme: Affine, warns: str = "") -> Plan:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", MeasureWarning)
        plan = Uniform(bits=4)(measure(source, scheme, (4,)))
    assert [warns in str(each.message) for each in said] == [True] * bool(warns)
    return plan


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_an_architecture_is_planned_as_it_is(tmp_path: Path, row: Row) -> None:
    source = saved(tmp_path / "model", row.state(), row.config, row.file)
    found = find_weights(source)
    assert len(found) == row.layers
    assert [w.name for w in found if w.channel_axis == 1] == [
        w.name for w in found if w.name.endswith(row.inputs_first or ("?",))
    ]
    for word, kind in (row.kinds or {}).items():
        assert [w.kind for w in found if w.name.rpartition(".")[2] == word] == [kind]
    assert tuple(name for w in found for name in w.tied) == row.tied
    roles = {role for _, why in found.left_alone if (role := why.partition(",")[0]).startswith("role:")}
    assert roles == set(row.by_default or {})
    for role, words in (row.by_default or {}).items():
        listed = [name.removesuffix(".weight") for name, why in found.left_alone if why.startswith(role)]
        assert len(listed) == len(words)
        assert all(any(name.endswith(f".{word}") for name in listed) for word in words)
        for name in listed:  # what is left alone by default is taken where it is asked for
            assert [w.name for w in find_weights(source, only=[name])] == [name]
    assert tuple(name for name, why in found.left_alone if not why.startswith("role:")) == row.others


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_its_plan_fits_it_and_can_be_written(tmp_path: Path, row: Row) -> None:
    source = saved(tmp_path / "model", row.state(), row.config, row.file)
    plan = plan_of(source, row.scheme, row.warns)
    assert len(plan.layers) == row.layers
    fit = match(plan, source, weights=True)
    assert not fit.problems
    assert not fit.notes
    if any(tensor.dtype == torch.float8_e4m3fn for tensor in row.state().values()):
        with pytest.raises(SettingError, match="Convert the checkpoint to bfloat16 first"):
            rewrite(source, plan, tmp_path / "out")
        return
    rewrite(source, plan, tmp_path / "out")
    assert not match(plan, tmp_path / "out").problems


def packed(**tensors: tuple[Sequence[int], torch.dtype]) -> State:
    name = f"{BLOCK}.self_attn.q_proj"
    return of(TEXT) | {
        f"{name}.{key.replace('__', '.')}": torch.ones(tuple(shape), dtype=dtype)
        for key, (shape, dtype) in tensors.items()
    }


def broken(value: float) -> State:
    state = llama()
    state[f"{BLOCK}.mlp.down_proj.weight"][0, 0] = value
    return state


def blocks() -> State:
    stack = f"{BLOCK}.mlp.experts.down_proj"
    return of(TEXT) | integers({f"{stack}_blocks": (4, 8, 2, 16), f"{stack}_scales": (4, 8, 2)}, torch.uint8)


ADAPTER = {
    f"base_model.{BLOCK}.q_proj.lora_A.weight": (4, HIDDEN),
    f"base_model.{BLOCK}.q_proj.lora_B.weight": (HIDDEN, 4),
}
REFUSED: dict[str, tuple[Callable[[], State], str, str, type[MPQError], str]] = {
    "gptq": (lambda: packed(qweight=((2, 16), torch.int32)), "gptq", "", SourceError, r"by gptq .*q_proj\.qweight"),
    "awq": (lambda: packed(qweight=((16, 2), torch.int32)), "awq", "", SourceError, r"by awq .*q_proj\.qweight"),
    "compressed-tensors": (
        lambda: packed(weight_packed=((16, 2), torch.int32)), "compressed-tensors", "", SourceError, "weight_packed",
    ),
    "bitsandbytes": (
        lambda: packed(weight=((128, 1), torch.uint8), weight__absmax=((4,), torch.float32)), "bitsandbytes", "",
        SourceError, "absmax|q_proj.weight",
    ),
    "mxfp4": (blocks, "mxfp4", "", SourceError, "down_proj_blocks"),
    "NaN": (lambda: broken(float("nan")), "", "", WeightError, "down_proj': holds NaN or infinite weights"),
    "infinity": (lambda: broken(float("inf")), "", "", WeightError, "down_proj': holds NaN or infinite weights"),
    "an adapter alone": (lambda: of(ADAPTER), "", "adapter_model.safetensors", SourceError, "role:lora"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_planned_is_refused_by_name(
    tmp_path: Path, case: tuple[Callable[[], State], str, str, type[MPQError], str]
) -> None:
    state, method, file, error, message = case
    config = {"quantization_config": {"quant_method": method}} if method else None
    source = saved(tmp_path / "model", state(), config, file or "model.safetensors")
    with pytest.raises(error, match=message):
        measure(source, PER_CHANNEL, (4,))


def test_an_adapter_alone_is_taken_where_it_is_asked_for(tmp_path: Path) -> None:
    source = saved(tmp_path / "model", of(ADAPTER), None, "adapter_model.safetensors")
    assert [w.name for w in find_weights(source, only=["role:lora"])] == [
        name.removesuffix(".weight") for name in ADAPTER
    ]


def test_shards_of_bin_files_are_one_checkpoint(tmp_path: Path) -> None:
    state = llama()
    names = list(state)
    files = {name: f"pytorch_model-0000{1 + (k % 2)}-of-00002.bin" for k, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: state[name] for name in names if files[name] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    assert len(find_weights(tmp_path)) == LLAMA_LAYERS
