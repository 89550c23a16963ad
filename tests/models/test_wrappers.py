"""What wraps a model makes no other model of it: names, fingerprints, and plans that fit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from mpq_plugins import Affine, Plan, Uniform, apply, compress, decompress, measure, verify
from mpq_plugins.errors import MismatchError
from mpq_plugins.models.wrappers import bare_names, renaming
from mpq_plugins.simulation.checkpoint import rewrite
from mpq_plugins.simulation.match import match
from tests.helpers.nets import conv_net

names = st.lists(
    st.lists(st.sampled_from(["a", "b", "module", "model", "0"]), min_size=1, max_size=3).map(".".join), unique=True
)
prefixes = st.lists(st.sampled_from(["module.", "_orig_mod.", "_fsdp_wrapped_module."]), max_size=3).map("".join)


def planned(source: nn.Module | Path) -> Plan:
    return Uniform(bits=3)(measure(source, Affine(granularity="per_channel"), (3,)))


class Holder(nn.Module):
    """Keeps a model under a name, as trainers' modules do."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.add_module(name, model)


def compiled(model: nn.Module) -> nn.Module:
    made = torch.compile(model, backend="eager")
    assert isinstance(made, nn.Module)
    return made


WRAPPINGS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "parallel": nn.DataParallel,
    "parallel twice": lambda model: nn.DataParallel(nn.DataParallel(model)),
    "compiled": compiled,
    "compiled and parallel": lambda model: nn.DataParallel(compiled(model)),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "Lightning's model": lambda model: Holder("model", model),
    "Lightning's net": lambda model: Holder("net", nn.DataParallel(model)),
}


def saved(path: Path, state: dict[str, Tensor]) -> Path:
    if path.suffix == ".pt":
        torch.save(state, path)
    else:
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


@given(names, prefixes)
def test_a_checkpoint_has_its_models_names(plain: list[str], prefix: str) -> None:
    shapes = {f"{name}.weight": (2, 2) for name in plain} | {"head.weight": (2,), "steps": ()}
    wrapped = {f"{prefix}{name}": shape for name, shape in shapes.items()}
    found = bare_names(wrapped | {"n_averaged": ()})
    assert [found[name] for name in wrapped] == list(shapes)
    assert found["n_averaged"] == "n_averaged"


@given(names)
def test_two_tensors_never_get_one_name(plain: list[str]) -> None:
    shapes = {name: (2,) for own in plain for name in (own, f"_orig_mod.{own}")}
    found = bare_names(shapes)
    assert len(set(found.values())) == len(found)


@given(names.filter(bool), prefixes, prefixes)
def test_names_of_one_model_are_found_however_it_is_wrapped(plain: list[str], one: str, other: str) -> None:
    there = [f"{other}{name}" for name in plain]
    found = renaming([(f"{one}{name}",) for name in plain], (), there)
    assert {f"{one}{name}": f"{other}{name}" for name in plain} == found or len(set(found.values())) == len(plain)
    assert set(found.values()) == set(there)


@given(names.filter(bool), st.sampled_from(["a", "b", "0"]))
def test_a_layer_that_is_not_there_is_not_found_under_another_name(plain: list[str], lacking: str) -> None:
    there = [name for name in plain if name.split(".")[-1] != lacking]
    gone = [name for name in plain if name not in there]
    found = renaming([(name,) for name in plain], (), there)
    assert found == ({name: name for name in plain} if not gone else {})


@pytest.mark.slow
@pytest.mark.parametrize("there", WRAPPINGS)
@pytest.mark.parametrize("made", WRAPPINGS)
def test_a_plan_made_under_any_wrapping_fits_under_any_other(made: str, there: str) -> None:
    plan = planned(WRAPPINGS[made](conv_net()))
    model = WRAPPINGS[there](conv_net())
    found = match(plan, model, rewrapped=True, weights=True)
    assert (found.problems, found.notes) == ((), ())
    quantized = apply(model, plan)
    assert type(quantized) is type(model)
    expected = apply(conv_net(), planned(conv_net())).state_dict()
    state = {name.removeprefix("n_averaged"): value for name, value in quantized.state_dict().items()}
    assert all(
        value.equal(own) for value, own in zip([v for n, v in state.items() if n], expected.values(), strict=True)
    )
    verify(quantized, plan, original=conv_net())


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("there", WRAPPINGS)
def test_checkpoints_of_any_wrapping_and_the_plain_model_are_one(tmp_path: Path, there: str, suffix: str) -> None:
    model = WRAPPINGS[there](conv_net())
    source = saved(tmp_path / f"in.{suffix}", model.state_dict())
    plain = planned(conv_net())
    of_file = measure(source, bits=(4,))
    if not there.startswith("Lightning"):  # whose word may be the model's own
        assert [layer.name for layer in of_file.layers] == [layer.name for layer in plain.layers] or suffix != "pt"
        assert of_file.fingerprint == measure(saved(tmp_path / f"x.{suffix}", conv_net().state_dict())).fingerprint
    rewrite(source, plain, tmp_path / f"out.{suffix}")
    compress(source, plain, tmp_path / "x.mpq")
    expected = apply(conv_net(), plain).state_dict()
    read = list(decompress(tmp_path / "x.mpq").items())
    for name, value in expected.items():
        assert any(own.endswith(name) and found.equal(value) for own, found in read)
    apply(model, Uniform(bits=4)(of_file))  # per tensor, as a file does not know which convolution is transposed


def test_a_models_own_part_called_module_stays(tmp_path: Path) -> None:
    model = Holder("module", nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    plan = planned(model)
    assert [layer.name for layer in plan.layers] == ["module.0", "module.1"]
    source = saved(tmp_path / "in.pt", model.state_dict())
    for fits in (model, source, nn.DataParallel(model), saved(tmp_path / "p.pt", nn.DataParallel(model).state_dict())):
        assert match(plan, fits, rewrapped=True).problems == ()
    assert match(planned(source), model, rewrapped=True).problems == ()


def test_a_part_that_is_parallel_alone(tmp_path: Path) -> None:
    plain = nn.ModuleDict({"features": nn.Sequential(nn.Linear(4, 4)), "head": nn.Linear(4, 2)})
    plan = planned(plain)
    parallel = nn.ModuleDict({"features": nn.DataParallel(plain["features"]), "head": plain["head"]})
    source = saved(tmp_path / "in.pt", parallel.state_dict())
    assert match(plan, source, weights=True).problems == match(plan, parallel, rewrapped=True).problems == ()
    assert match(planned(source), plain, rewrapped=True).problems == ()


def test_two_models_in_one_file_are_not_taken_for_one(tmp_path: Path) -> None:
    state = {f"{own}.{name}": value for own in ("model", "teacher") for name, value in conv_net().state_dict().items()}
    source = saved(tmp_path / "in.pt", state)
    with pytest.raises(MismatchError, match="Missing here: 'conv1'"):
        rewrite(source, planned(conv_net()), tmp_path / "out.pt")


def test_a_wrapped_module_is_refused_where_the_plan_is_not_renamed() -> None:
    found = match(planned(conv_net()), nn.DataParallel(conv_net()))
    assert "Missing here: 'conv1'" in found.problems[0]


@given(st.sampled_from(["model.", "net.", "module.", "model._orig_mod.", "model.module."]))
def test_a_trainers_other_modules_hide_no_model(held: str) -> None:
    names = ["conv", "block.fc"]
    there = [f"{held}{name}" for name in names]
    assert renaming([[name] for name in names], (), [*there, "criterion.vgg"]) == dict(zip(names, there, strict=True))
    for other in ("ema_model.", "teacher.", "net2.module.") * (held != "module."):  # which of the two is not said
        assert renaming([[name] for name in names], (), [*there, *(f"{other}{name}" for name in names)]) == {}
    assert renaming([[name] for name in names], (), [f"generator.{name}" for name in names] + ["criterion.vgg"]) == {}
