from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from mpq_plugins import Affine, Plan, Uniform, apply, compress, measure
from mpq_plugins.checkpoints.checkpoint import open_checkpoint
from mpq_plugins.compression import write as writing
from mpq_plugins.compression.codes import encode
from mpq_plugins.errors import MismatchError, SourceError
from mpq_plugins.measurement import measure as run
from mpq_plugins.simulation import checkpoint as rewriting
from mpq_plugins.simulation.checkpoint import rewrite
from mpq_plugins.simulation.layer import simulate_layer
from mpq_plugins.simulation.match import match
from tests.helpers.nets import conv_net, tied_net
from tests.helpers.says import naming


def plan_for(net: nn.Module, scheme: Affine | None = None, fold_bn: bool = False) -> Plan:
    return Uniform(bits=4)(measure(net, scheme, (4,), fold_bn=fold_bn))


def test_the_model_it_was_made_for_fits_without_notes(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv1d(4, 4, 2), nn.Linear(4, 4), nn.Embedding(9, 4))
    save_model(net, str(tmp_path / "net.safetensors"))
    found = match(plan_for(net), tmp_path / "net.safetensors", weights=True)
    assert (found.problems, found.notes, found.layers) == ((), (), 4)


def test_other_weights_fit_with_a_note() -> None:
    net = conv_net()
    plan = plan_for(net)
    with torch.no_grad():
        net.conv1.weight[3].mul_(1.001)  # one channel is enough
    found = match(plan, net, weights=True)
    assert found.problems == ()
    assert "not those it was made from" in found.notes[0]


def test_a_folded_plan_does_not_fit_a_file(tmp_path: Path) -> None:
    net = conv_net()
    save_model(net, str(tmp_path / "net.safetensors"))
    plan = plan_for(net, fold_bn=True)
    assert match(plan, net).problems == ()
    assert "cannot be folded" in match(plan, tmp_path / "net.safetensors").problems[0]


def test_a_transposed_convolution_planned_from_a_file_by_channel_does_not_fit_the_module(tmp_path: Path) -> None:
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 2))
    save_model(net, str(tmp_path / "net.safetensors"))
    by_channel = Uniform(bits=4)(measure(tmp_path / "net.safetensors", Affine(granularity="per_channel"), (4,)))
    assert "another channel axis: '0'" in match(by_channel, net).problems[0]
    whole = Uniform(bits=4)(measure(tmp_path / "net.safetensors", bits=(4,)))
    assert match(whole, net).problems == ()


def test_a_tied_weight_fits_under_either_name() -> None:
    plan = plan_for(tied_net())
    swapped = nn.Module()
    net = tied_net()
    swapped.lm_head, swapped.embed, swapped.again, swapped.block = net.lm_head, net.embed, net.again, net.block
    assert match(plan, swapped).problems == ()


def test_skipped_layers_are_expected_to_be_there() -> None:
    net = conv_net()
    plan = Uniform(bits=4)(measure(net, bits=(4,), skip=["up"], fold_bn=False))
    assert match(plan, net).problems == ()
    del net.up
    assert match(plan, net).problems == ("Missing here: 'up'.",)


@pytest.mark.parametrize("count", [3, 9])
def test_long_lists_are_cut_with_a_count(count: int) -> None:
    plan = plan_for(nn.Sequential(*(nn.Linear(2, 2) for _ in range(count))))
    (problem, _) = match(plan, conv_net()).problems
    assert ("and 4 more" in problem) == (count == 9)


def tied_plan(folder: Path) -> Plan:
    """Of one weight with two names, a and b, per channel."""
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    torch.save({"a.weight": weight, "b.weight": weight}, folder / "tied.pt")
    return Uniform(bits=3)(measure(folder / "tied.pt", Affine(granularity="per_channel")))


def stored(path: Path, **tensors: torch.Tensor) -> Path:
    state = {f"{name}.weight": tensor for name, tensor in tensors.items()}
    if path.suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    return path


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_a_tied_plan_fits_two_copies_and_both_are_quantized(tmp_path: Path, name: str) -> None:
    plan = tied_plan(tmp_path)
    one = torch.load(tmp_path / "tied.pt", weights_only=True)["a.weight"]
    path = stored(tmp_path / name, a=one, b=one.clone())
    found = match(plan, path, weights=True)
    assert (found.problems, found.notes) == ((), ())
    done: list[int] = []
    rewrite(path, plan, tmp_path / f"out-{name}", lambda _, weights, __: done.append(weights))
    assert done[-1] == one.numel()
    expected = simulate_layer(one, plan.layers[0])
    written = open_checkpoint(tmp_path / f"out-{name}")
    assert all(written[f"{own}.weight"].tensor().equal(expected) for own in "ab")
    container = compress(path, plan, tmp_path / "net.mpq")
    assert all(container.tensor(f"{own}.weight").equal(expected) for own in "ab")


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda one: one + 1e-6, "One weight in the plan, and with different values here: 'a' and 'b'"),
        (lambda one: one[:3], r"Other shapes: 'b' \[4, 3\] in the plan, \[3, 3\] here"),
        (lambda one: one.bfloat16(), "One weight in the plan, and with different values here: 'a' and 'b'"),
    ],
)
def test_two_weights_do_not_fit_a_tied_plan_and_nothing_is_written(
    tmp_path: Path, name: str, other: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    plan = tied_plan(tmp_path)
    one = torch.load(tmp_path / "tied.pt", weights_only=True)["a.weight"]
    path = stored(tmp_path / name, a=one, b=other(one).clone())
    before = sorted(tmp_path.iterdir())
    for use in (
        lambda: match(plan, path).require("net"),
        lambda: rewrite(path, plan, tmp_path / f"out-{name}"),
        lambda: compress(path, plan, tmp_path / "net.mpq"),
    ):
        with pytest.raises(MismatchError, match=message):
            use()
    assert sorted(tmp_path.iterdir()) == before


def test_two_modules_do_not_fit_a_tied_plan() -> None:
    net = tied_net()
    plan = Uniform(bits=4)(measure(net))
    tied = next(layer for layer in plan.layers if layer.tied)
    module = net.get_submodule(tied.tied[0])
    assert isinstance(module, nn.Embedding | nn.Linear)
    module.weight = nn.Parameter(module.weight.detach().clone())
    assert match(plan, net).problems == ()
    with torch.no_grad():
        module.weight[0, 0] += 1
    with pytest.raises(MismatchError, match=naming("One weight", "different values")):
        apply(net, plan)


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_a_source_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stored(tmp_path / name, a=torch.randn(4, 3), b=torch.randn(4, 3))
    new = stored(tmp_path / f"new-{name}", a=torch.randn(4, 3), b=torch.randn(4, 3)).read_bytes()
    plan = Uniform(bits=3)(measure(path))

    def replacing(function: Callable[..., Any]) -> Callable[..., Any]:
        def replaced(*arguments: Any, **options: Any) -> Any:
            (tmp_path / "beside").write_bytes(new)
            (tmp_path / "beside").replace(path)
            return function(*arguments, **options)

        return replaced

    monkeypatch.setattr(run, "_measured", replacing(run._measured))
    with pytest.raises(SourceError, match=naming(name, "changed", "two models")):
        measure(path)
    monkeypatch.undo()
    monkeypatch.setattr(rewriting, "simulate_layer", replacing(simulate_layer))
    with pytest.raises(SourceError, match="changed while it was read"):
        rewrite(path, plan, tmp_path / f"out-{name}")
    monkeypatch.undo()
    monkeypatch.setattr(writing, "encode", replacing(encode))
    with pytest.raises(SourceError, match="changed while it was read"):
        compress(path, plan, tmp_path / "net.mpq")
    assert sorted(own.name for own in tmp_path.iterdir()) == sorted([name, f"new-{name}"])
