from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from mpq_plugins import Affine, Plan, Uniform, measure
from mpq_plugins.match import match
from tests.nets import conv_net, tied_net


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
