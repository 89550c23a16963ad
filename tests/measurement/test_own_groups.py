"""Layers whose inputs do not divide into the groups that were asked for: measured, planned and applied alike."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mpq_plugins import (
    Affine,
    Budget,
    LayerTable,
    Plan,
    Uniform,
    apply,
    compress,
    decompress,
    measure,
    sensitivity,
    verify,
)
from mpq_plugins.allocation.objective import predicted
from mpq_plugins.errors import MeasureWarning
from mpq_plugins.models.kinds import quantizable_weights
from mpq_plugins.quantization.quantize import fake_quantize
from mpq_plugins.report.details import table_details
from mpq_plugins.simulation.checkpoint import rewrite

ASKED = Affine(granularity="per_group", group_size=64, range="mse")
OWN = {
    "0": ASKED,
    "1": Affine(granularity="per_group", group_size=32, range="mse"),
    "2": Affine(granularity="per_channel", range="mse"),
    "3": ASKED,
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 96), nn.Linear(96, 40), nn.Linear(40, 64), nn.Linear(64, 8)).eval()


def table(scheme: Affine = ASKED, only: tuple[str, ...] = ()) -> LayerTable:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MeasureWarning)
        return measure(net(), scheme, (2, 3, 4), ("mse",), per_channel=True, only=only)


def test_what_is_said_of_the_table_has_each_kind_of_groups() -> None:
    (line, *_) = table_details(table())
    assert line.split("  ")[-1].strip() == (
        "affine, groups of 64, clipped; affine, groups of 32, clipped; affine, per channel, clipped"
    )


def batches() -> list[torch.Tensor]:
    return [torch.randn(8, 128, generator=torch.Generator().manual_seed(1))]


def test_each_such_layer_is_named_with_its_own_groups() -> None:
    with pytest.warns(MeasureWarning) as said:
        measure(net(), ASKED, (4,))
    (text,) = [str(each.message) for each in said]
    assert "group_size: 64 does not divide the inputs of 2 layers" in text
    assert "'1' (96 inputs, groups of 32), '2' (40 inputs, per channel)" in text


def test_the_table_has_what_measuring_under_a_layers_own_scheme_gives() -> None:
    whole = table()
    for layer in whole.layers:
        own = OWN[layer.name]
        assert whole.scheme_of(layer) == own
        (alone,) = table(own, (layer.name,)).layers
        np.testing.assert_array_equal(layer.errors["mse"], alone.errors["mse"])
        np.testing.assert_array_equal(layer.channel_errors["mse"], alone.channel_errors["mse"])


@pytest.mark.parametrize("kind", ["output_mse", "kl", "compensated_mse"])
def test_sensitivities_are_those_under_the_layers_own_scheme(kind: str) -> None:
    measured = sensitivity(net(), table(), kind, batches())
    for layer in measured.layers:
        (alone,) = sensitivity(net(), table(OWN[layer.name], (layer.name,)), kind, batches()).layers
        np.testing.assert_allclose(layer.sensitivities[kind], alone.sensitivities[kind], rtol=1e-6)


def test_the_hessian_weighs_the_errors_under_the_layers_own_scheme() -> None:
    for layer in sensitivity(net(), table(), "hessian", batches()).layers:
        shares = layer.sensitivities["hessian"] / layer.errors["mse"]
        np.testing.assert_allclose(shares, shares[0], rtol=1e-6)


def plans() -> list[Plan]:
    measured = table()
    budgets = [Budget(total_average_bits=4, sensitivity="mse", bits=(2, 3, 4), parts=parts) for parts in (False, True)]
    return [Uniform(bits=3)(measured), *(budget(measured) for budget in budgets)]


def test_plans_record_it_count_it_and_are_priced() -> None:
    for plan in plans():
        assert {layer.name: layer.scheme for layer in plan.layers} == OWN
        bits = 0
        for layer in plan.layers:
            groups = {"0": 2, "1": 3, "2": 1, "3": 1}[layer.name]
            for width, channels in layer.widths:
                bits += channels * (layer.shape[1] * width + groups * (32 + width))
            if layer.parts:
                bits += layer.channels * int(np.ceil(np.log2(len(layer.parts))))
        assert plan.size().total_bits == bits
        assert predicted(table(), plan, "mse") is not None
        assert Plan.from_document(plan.document(), "plan") == plan
    assert all(plan.size().total_average_bits <= 4 for plan in plans()[1:])


def test_models_files_and_containers_get_the_same_weights(tmp_path: Path) -> None:
    model = net()
    source, target = tmp_path / "net.safetensors", tmp_path / "out.safetensors"
    save_file(model.state_dict(), source)
    for plan in plans():
        applied = apply(model, plan)
        assert verify(applied, plan, model)
        for name, own in OWN.items():
            bits = plan.by_name[name].bits
            if bits is not None:
                expected = fake_quantize(quantizable_weights(model)[name], bits, own, layer=name)
                assert torch.equal(quantizable_weights(applied)[name], expected)
        rewrite(source, plan, target)
        container = compress(source, plan, tmp_path / "net.mpqc")
        for state in (load_file(target), decompress(container)):
            assert all(torch.equal(state[key], value) for key, value in applied.state_dict().items())
        container.path.unlink()
        target.unlink()
