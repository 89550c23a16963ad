"""Configurations against what their readers make of them: exact names, the last or only entry a layer's."""

import json
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from mpq_plugins import Affine, EntropyCoded, MismatchError, SettingError, Uniform, legalise, measure
from mpq_plugins.adapters.configs import auto_round, llm_compressor, modelopt
from mpq_plugins.adapters.contract import ConfigWriter
from tests.adapters.llamas import CHANNELS, GROUPS, plan_of, save_llama

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers warns of is its own

WRITERS: list[ConfigWriter] = [modelopt, auto_round, llm_compressor]
ALL = {"model.embed_tokens", "lm_head"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "source", num_hidden_layers=11)


def bits(place: int, name: str) -> int:
    return 32 if ".1.mlp" in name else (2, 3, 4, 8)[place % 4]


@pytest.mark.parametrize("scheme", [GROUPS, CHANNELS, Affine(symmetric=True)], ids=str)
def test_modelopt_turns_each_layer_on_and_no_other(source: Path, scheme: Affine) -> None:
    yaml = pytest.importorskip("yaml")
    plan = plan_of(source, scheme, bits)
    recipe = yaml.safe_load(modelopt.config(plan, source))
    assert recipe["metadata"]["recipe_type"] == "ptq"
    entries = recipe["quantize"]["quant_cfg"]

    def last(name: str) -> dict[str, Any]:
        found: dict[str, Any] = [e for e in entries if fnmatch(f"{name}.weight_quantizer", e["quantizer_name"])][-1]
        return found

    grain: dict[str, dict[str, Any]] = {
        "per_group": {"block_sizes": {-1: 32, "type": "static"}},
        "per_channel": {"axis": 0},
    }
    for layer in plan.layers:
        entry = last(layer.name)
        if layer.in_float:
            assert entry.get("enable") is False
        else:
            assert entry["cfg"] == {"num_bits": layer.bits, **grain.get(scheme.granularity, {"axis": None})}
    assert {entry["quantizer_name"] for entry in entries[1:]} == {
        f"{name}.weight_quantizer" for name in ("lm_head", *(layer.name for layer in plan.layers))
    }
    for other in ("lm_head", "model.layers.1.mlp.up_proj.input", "vision.model.layers.1.self_attn.q_proj"):
        assert last(other).get("enable") is False


@pytest.mark.parametrize("symmetric", [False, True])
def test_auto_round_has_every_layer_and_floats_at_16_bits(source: Path, symmetric: bool) -> None:
    plan = plan_of(source, replace(GROUPS, symmetric=symmetric), bits)
    layers = json.loads(auto_round.config(plan, source))
    assert {name for name, one in layers.items() if one == {"bits": 16}} == {
        "lm_head", *(layer.name for layer in plan.layers if layer.in_float),
    }  # fmt: skip
    for layer in plan.layers:
        if not layer.in_float:
            assert layers[layer.name] == {"bits": layer.bits, "group_size": 32, "sym": symmetric}
    assert json.loads(auto_round.config(plan_of(source, CHANNELS), source))["model.layers.0.mlp.up_proj"] == {
        "bits": 4, "group_size": -1, "sym": True,
    }  # fmt: skip


def test_auto_round_refuses_what_it_loads_at_random(source: Path) -> None:
    plan = plan_of(source, GROUPS)
    first = plan.layers[0].model_copy(update={"scheme": replace(GROUPS, symmetric=False)})
    mixture = plan.model_copy(update={"layers": (first, *plan.layers[1:])})
    with pytest.raises(SettingError, match=f"'{first.name}' is asymmetric and .*--symmetric"):
        auto_round.config(mixture, source)


@pytest.mark.parametrize("scheme", [GROUPS, CHANNELS, Affine(symmetric=True)], ids=str)
def test_llm_compressor_has_a_group_for_each_scheme(source: Path, scheme: Affine) -> None:
    plan = plan_of(source, scheme, bits)
    recipe = json.loads(llm_compressor.config(plan, source))
    modifier = recipe["default_stage"]["default_modifiers"]["QuantizationModifier"]
    groups = modifier["config_groups"].values()
    assert len(groups) == 4
    widths = {name: group["weights"] for group in groups for name in group["targets"]}
    assert {name: weights["num_bits"] for name, weights in widths.items()} == {
        layer.name: layer.bits for layer in plan.layers if not layer.in_float
    }
    strategy = {"per_group": "group", "per_channel": "channel", "per_tensor": "tensor"}[scheme.granularity]
    assert {(w["strategy"], w["group_size"], w["symmetric"]) for w in widths.values()} == {
        (strategy, scheme.group_size, True)
    }
    assert {*modifier["ignore"]} == {"lm_head", *(layer.name for layer in plan.layers if layer.in_float)}


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.CAPABILITIES.backend)
def test_what_cannot_be_said_is_refused(writer: ConfigWriter, source: Path, tmp_path: Path) -> None:
    backend = writer.CAPABILITIES.backend
    with pytest.raises(SettingError, match=f"{backend} has no 1 bits"):
        writer.config(plan_of(source, GROUPS, 1), source)
    with pytest.raises(SettingError, match=f"{backend} does not quantize embedding layers"):
        writer.config(plan_of(source, GROUPS, 4, skip=()), source)
    with pytest.raises(MismatchError, match="another model"):
        writer.config(plan_of(source), save_llama(tmp_path / "other", num_hidden_layers=1))
    coded = Uniform(bits=4)(measure(source, EntropyCoded(step=0.01), (4,), skip=sorted(ALL)))
    with pytest.raises(SettingError, match=f"entropy-coded, and {backend} finds scales of its own"):
        writer.config(coded, source)
    legal, _ = legalise(plan_of(source, replace(GROUPS, symmetric=False), lambda place, _: 1 + place % 8),
                        writer.CAPABILITIES)  # fmt: skip
    assert writer.config(legal, source)
