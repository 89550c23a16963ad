"""What a file does not say, its model or a plan of it does: which tensors are layers, and along which axis."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpq_plugins import Affine, Plan, Uniform, apply, compress, decompress, find_weights, measure
from mpq_plugins.checkpoints.checkpoint import load_torch
from mpq_plugins.errors import MismatchError, SourceError
from mpq_plugins.simulation.checkpoint import rewrite
from mpq_plugins.simulation.match import match
from tests.helpers.odd_modules import odd_modules, tensors_of
from tests.helpers.says import naming

BY_CHANNEL = Affine(granularity="per_channel")
SLOW = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def planned(source: nn.Module | Path, **options: Any) -> Plan:
    return Uniform(bits=3)(measure(source, BY_CHANNEL, (3,), **options))


def saved(folder: Path, state: dict[str, Tensor], **config: Any) -> Path:
    """A directory with these tensors, and a config.json where something is to be said there."""
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
@given(odd_modules(), st.sampled_from(["safetensors", "pt"]), st.sampled_from(["", "module.", "_orig_mod.", "model."]))
@SLOW
def test_a_modules_plan_fits_its_own_checkpoint_and_makes_of_it_what_it_makes_of_the_module(
    tmp_path_factory: pytest.TempPathFactory, module: nn.Module, suffix: str, prefix: str
) -> None:
    folder = tmp_path_factory.mktemp("odd")
    source, target = folder / f"in.{suffix}", folder / f"out.{suffix}"
    state = {f"{prefix}{name}": value for name, value in tensors_of(module).items()}
    if suffix == "pt":
        torch.save(state, source)
    else:
        save_file(state, source)
    plan = planned(module)
    plan.save(folder / "plan.json")
    plan = Plan.load(folder / "plan.json")
    found = match(plan, source, weights=True)
    assert (found.problems, found.notes) == ((), ())
    expected = apply(module, plan).state_dict()
    for model in (None, module):
        rewrite(source, plan, target, model=model)
        written = load_torch(target) if suffix == "pt" else load_file(target)
        assert {name.removeprefix(prefix) for name in written} == set(expected)
        assert all(value.equal(expected[name.removeprefix(prefix)]) for name, value in written.items())
    compress(source, plan, folder / "x.mpq")
    read = decompress(folder / "x.mpq")
    own = "" if prefix in ("module.", "_orig_mod.") else prefix
    assert all(read[f"{own}{name}"].equal(value) for name, value in expected.items())


@given(odd_modules())
@SLOW
def test_a_model_tells_what_its_checkpoint_holds(tmp_path_factory: pytest.TempPathFactory, module: nn.Module) -> None:
    source = tmp_path_factory.mktemp("odd") / "in.safetensors"
    save_file(tensors_of(module), source)
    told = {w.name: (w.kind, w.channel_axis, w.shape) for w in find_weights(source, model=module)}
    assert told == {w.name: (w.kind, w.channel_axis, w.shape) for w in find_weights(module)}
    for weight in find_weights(source, model=module):
        assert weight.tensor().equal(module.get_submodule(weight.name).weight)  # type: ignore[arg-type]
    by_file, by_module = measure(source, BY_CHANNEL, (3,), model=module), measure(module, BY_CHANNEL, (3,))
    assert by_file.fingerprint == by_module.fingerprint


@given(odd_modules(), odd_modules())
@SLOW
def test_a_plan_never_fits_another_models_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, module: nn.Module, other: nn.Module
) -> None:
    source = tmp_path_factory.mktemp("odd") / "in.safetensors"
    save_file(tensors_of(other), source)
    plan = planned(module)
    fits = not match(plan, source).problems
    ours, theirs = ({w.name: w.shape for w in find_weights(own)} for own in (module, other))
    for prefix in ("", "model.", "net."):  # with which the one's names, or the other's, may begin
        for mine, yours in ((ours, theirs), (theirs, ours)):
            renamed = {f"{prefix}{name}": shape for name, shape in mine.items()}
            more = {f"{name}.weight" for name in yours.keys() - renamed.keys()}
            if renamed.items() <= yours.items() and more <= set(plan.left_alone):
                return
    assert not fits


def test_an_old_plan_needs_the_model_to_know_what_is_no_layer(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(3, 4, 5))
    save_file(tensors_of(module), tmp_path / "in.safetensors")
    plan = planned(module).model_copy(update={"left_alone": ()})
    with pytest.raises(MismatchError, match=naming("not in the plan", "'1'", "--model")):
        rewrite(tmp_path / "in.safetensors", plan, tmp_path / "out.safetensors")
    rewrite(tmp_path / "in.safetensors", plan, tmp_path / "out.safetensors", model=module)
    assert load_file(tmp_path / "out.safetensors")["1.weight"].equal(module.state_dict()["1.weight"])


def test_another_model_than_the_checkpoints_is_refused(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 4))
    save_file(tensors_of(module), tmp_path / "in.safetensors")
    for other, message in (
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "has a layer '1', which the checkpoint lacks"),
        (nn.Sequential(nn.Linear(4, 5)), r"has \[5, 4\] for layer '0', and the checkpoint \[4, 4\]"),
    ):
        with pytest.raises(SourceError, match=message):
            find_weights(tmp_path / "in.safetensors", model=other)


def test_a_plan_without_a_field_for_what_is_no_layer_reads_as_before(tmp_path: Path) -> None:
    plan = planned(nn.Sequential(nn.Linear(4, 4)))
    assert "left_alone" not in plan.to_json()
    assert "weights" not in json.loads(plan.to_json())
    norm = planned(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm((2, 2))))
    assert json.loads(norm.to_json())["left_alone"] == ["1.weight"]


@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize("by", ["type", "bias"])
def test_gpt2s_layers_have_their_outputs_where_transformers_keeps_them(
    tmp_path: Path, inputs_first: bool, by: str
) -> None:
    shapes = {"c_attn": (8, 24), "c_proj": (8, 8), "c_fc": (8, 32)}
    state = {
        f"h.0.{name}.weight": torch.randn(shape if inputs_first else shape[::-1]) for name, shape in shapes.items()
    }
    if by == "bias":
        state |= {f"h.0.{name}.bias": torch.randn(shape[1]) for name, shape in shapes.items()}
    config = {"model_type": "gpt2" if inputs_first else "gptj"} if by == "type" else {}
    found = {weight.name: weight for weight in find_weights(saved(tmp_path / "gpt", state, **config))}
    for name, (_, outputs) in shapes.items():
        weight = found[f"h.0.{name}"]
        assert (weight.kind, weight.channel_axis, weight.channels) == ("linear", int(inputs_first), outputs)
        matrix = state[f"h.0.{name}.weight"]
        assert weight.rows(1, 3).equal((matrix.T if inputs_first else matrix)[1:3])


def test_the_model_knows_where_its_outputs_are_though_the_file_does_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plan = planned(saved(tmp_path / "gpt", {"c_attn.weight": torch.randn(6, 9)}, model_type="gpt2"))
    (tmp_path / "gpt" / "config.json").unlink()
    assert match(plan, tmp_path / "gpt", weights=True).problems == ()


@pytest.mark.parametrize("apart", [False, True])
def test_copies_of_a_tied_weight_are_one_layer(tmp_path: Path, apart: bool) -> None:
    table = torch.randn(9, 4)
    head = torch.randn(9, 4) if apart else table.clone()
    state = {"model.embed_tokens.weight": table, "lm_head.weight": head, "model.q.weight": torch.randn(4, 4)}
    source = saved(tmp_path / "in", state, tie_word_embeddings=True)
    found = {weight.name: weight.tied for weight in find_weights(source)}
    if apart:
        assert found == {"lm_head": (), "model.embed_tokens": (), "model.q": ()}
        return
    assert found == {"model.embed_tokens": ("lm_head",), "model.q": ()}
    plan = planned(source)
    assert (plan.layers[0].name, plan.layers[0].kind) == ("model.embed_tokens", "embedding")
    done: list[int] = []
    rewrite(source, plan, tmp_path / "out", lambda _, now, total: done.append(now <= total))
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert out["lm_head.weight"].equal(out["model.embed_tokens.weight"])
    assert not out["lm_head.weight"].equal(table)
    assert all(done)
    container = compress(source, plan, tmp_path / "x.mpq")
    assert [record.same for record in container.header.tensors].count(None) == 2
    assert all(value.equal(out[name]) for name, value in decompress(tmp_path / "x.mpq").items())


def test_copies_that_no_configuration_ties_are_two_layers(tmp_path: Path) -> None:
    table = torch.randn(9, 4)
    state = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}
    for folder, config in (("untied", {"tie_word_embeddings": False}), ("unsaid", {})):
        assert len(find_weights(saved(tmp_path / folder, state, **config))) == 2


def test_a_tied_plan_and_a_file_that_holds_different_weights_is_refused(tmp_path: Path) -> None:
    module = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    module["head"].weight = module["embed"].weight
    plan = planned(module)
    state = tensors_of(module)
    save_file(state, tmp_path / "same.safetensors")
    rewrite(tmp_path / "same.safetensors", plan, tmp_path / "out.safetensors")
    out = load_file(tmp_path / "out.safetensors")
    assert out["embed.weight"].equal(out["head.weight"])
    save_file({"embed.weight": state["embed.weight"]}, tmp_path / "one.safetensors")
    assert match(plan, tmp_path / "one.safetensors").problems == ()
    for change, message in (
        (
            {"head.weight": state["head.weight"] + 1},
            "One weight in the plan, and with different values here: 'embed' and 'head'",
        ),
        ({"head.weight": torch.randn(8, 4)}, r"Other shapes: 'head' \[9, 4\] in the plan, \[8, 4\] here"),
    ):
        save_file(state | change, tmp_path / "other.safetensors")
        with pytest.raises(MismatchError, match=message):
            rewrite(tmp_path / "other.safetensors", plan, tmp_path / "no.safetensors")
    assert not (tmp_path / "no.safetensors").exists()


def test_what_is_tied_in_the_module_and_planned_apart_must_have_one_width(tmp_path: Path) -> None:
    module = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    module["head"].weight = module["embed"].weight
    save_file(tensors_of(module), tmp_path / "copies.safetensors")
    plan = planned(tmp_path / "copies.safetensors")
    assert len(plan.layers) == 2
    assert match(plan, module).problems == ()
    other = plan.model_copy(
        update={"layers": tuple(o.model_copy(update={"bits": o.bits + n}) for n, o in enumerate(plan.layers) if o.bits)}
    )
    assert "planned apart with different widths: 'embed', 'head'" in match(other, module).problems[0]
