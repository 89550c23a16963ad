"""The law of every path that quantizes a model: at 8 bits it computes what the float model does, or is refused by name.

The float model is the oracle. Models are put together at random from what users' models are made of. A few of them
amplify rounding: those may change by twice what rounding their weights in place does, which folds and skips nothing.
"""

import copy
import warnings
from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from hypothesis import Phase, example, given, settings
from torch import Tensor, nn

from mpq_plugins import Affine, LayerTable, Uniform, apply, measure, sensitivity, verify
from mpq_plugins.errors import MPQError, SettingError
from mpq_plugins.models.plain import is_plain
from mpq_plugins.reconstruction.rounding import Rounding
from tests.helpers.odd import PARAMETRIZED, Recipe, inputs, recipes

pytestmark = pytest.mark.slow

PER_CHANNEL = Affine(granularity="per_channel")
# How BatchNorm is measured, the rounding on inputs, if any, and how far outputs may go from the float ones at 8 bits.
PATHS: tuple[tuple[Affine, bool | Literal["auto"], Rounding | None, float], ...] = (
    (Affine(), "auto", None, 0.05),
    (PER_CHANNEL, True, None, 0.02),
    (PER_CHANNEL, False, "nearest", 0.02),
    (PER_CHANNEL, False, "compensated", 0.02),
)
MODELS = 80  # `make fuzz` draws others, and more


def change(exact: Tensor, other: Tensor) -> float:
    return float((other - exact).norm() / exact.norm().clamp_min(1e-6))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def rounding(recipe: Recipe, batch: Tensor, exact: Tensor) -> float:
    """How far outputs go where every weight is rounded to 8 bits of its channel's range, in a loop over channels."""
    model = recipe.build()
    layers = [module for name, module in model.named_modules() if name not in recipe.skip]
    weights = {id(w): (m, w) for m in layers if (w := m._parameters.get("weight")) is not None and w.dim() > 1}
    with torch.no_grad():
        for module, weight in weights.values():
            for channel in weight.unbind(1 if isinstance(module, nn.ConvTranspose2d) else 0):
                low, high = min(0.0, float(channel.min())), max(0.0, float(channel.max()))
                step = max((high - low) / 255, 1e-12)
                channel.copy_((channel / step).round() * step)
        return change(exact, model(batch))


def outcome(model: nn.Module, recipe: Recipe, batch: Tensor, exact: Tensor) -> str | None:
    """What went wrong, in words; None where the law holds."""
    noise = rounding(recipe, batch, exact)
    for scheme, fold, how_rounded, limit in PATHS:
        how = f"{scheme}, fold_bn={fold}, on inputs: {how_rounded}"
        try:
            plan = Uniform(bits=8)(measure(model, scheme, [8], skip=recipe.skip, fold_bn=fold))
            quantized = apply(model, plan, calibrate=[batch] if how_rounded else None, rounding=how_rounded)
            if how_rounded is None:
                verify(quantized, plan, original=model)
        except MPQError as error:
            if names_a_module(str(error), model) or "cannot be traced" in str(error):
                continue
            return f"{how}: refused without a name: {error}"
        with torch.no_grad():
            found = change(exact, quantized(batch))
        if not found < max(limit, 2 * noise):
            return f"{how}: changed by {found:.1%}, rounding alone by {noise:.1%}"
    return None


def names_a_module(text: str, model: nn.Module) -> bool:
    return any(f"'{name}'" in text for name, _ in model.named_modules() if name)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Operators this small wait for a second thread longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=MODELS, phases=[Phase.explicit, Phase.generate])
@given(recipes())
@example(Recipe((("plain", "in training mode", "Wiring"),), "Linear", 0))
@example(Recipe((("plain", "plain", "Tied"),), "Linear", 0))
@example(Recipe((("standardised", "plain", "Wiring"), ("rectified", "plain", "ByName")), "Cosine", 1))
@example(Recipe((("plain, no bias", "synchronised", "BiasLent"), ("depthwise", "plain", "Aside")), "LowRank", 2))
@example(Recipe((("weight norm", "plain", "Wiring"), ("pruned", "with activation", "SharedBy")), "Gained", 3))
def test_a_model_computes_the_same_at_8_bits_or_is_refused_by_name(recipe: Recipe) -> None:
    model = recipe.build()
    torch.manual_seed(recipe.seed + 1)
    batch = inputs()
    with torch.no_grad():
        exact = model(batch)
    before, attributes = state(model), [{**vars(module)} for module in model.modules()]
    assert outcome(model, recipe, batch, exact) is None
    after = state(model)
    assert before.keys() == after.keys()
    assert all(value.equal(after[name]) for name, value in before.items())
    assert [vars(module).keys() for module in model.modules()] == [own.keys() for own in attributes]


class Watch:
    """What a layer is given, call by call."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.inputs: list[Tensor] = []
        model.get_submodule(name).register_forward_hook(self.see, with_kwargs=True)

    def see(self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        self.inputs.append((*args, *kwargs.values())[0].clone())


@pytest.mark.filterwarnings("ignore")
@example(Recipe((("called", "plain", "Residual"),), "Cosine", 3073))
@settings(max_examples=25, phases=[Phase.explicit, Phase.generate])
@given(recipes())
def test_output_mse_of_a_layer_that_is_not_torchs_is_what_it_does(recipe: Recipe) -> None:
    """Against a run of each layer, with its quantized weight put into a copy of the model."""
    model = recipe.build()
    torch.manual_seed(recipe.seed + 1)
    batch = inputs()
    table: LayerTable = measure(model, PER_CHANNEL, [4], skip=recipe.skip)
    lent = [k for k, (layer, _, wiring) in enumerate(recipe.blocks) if wiring in ("Tied", "HeldBy")]
    if any(recipe.blocks[k][0] not in PARAMETRIZED for k in lent):
        with pytest.raises(SettingError, match="a functional call uses its weight too"):
            sensitivity(model, table, "output_mse", [batch])
        return
    table = sensitivity(model, table, "output_mse", [batch])
    quantized = apply(model, Uniform(bits=4)(table))
    for layer in table.layers:
        module = model.get_submodule(layer.name)
        if layer.tied or is_plain(module) or module._forward_pre_hooks:  # a hook's input is not the layer's own
            continue
        # Layers inside it stay in float. A hook sees what `forward` gives, and a layer may have its own `__call__`.
        watched, exact, rough = copy.deepcopy(model), copy.deepcopy(module), copy.deepcopy(module)
        rough.weight = quantized.get_parameter(f"{layer.name}.weight")
        watch = Watch(watched, layer.name)
        with torch.no_grad():
            watched(batch)
            true = sum(float((rough(x) - exact(x)).double().square().sum()) for x in watch.inputs) / len(batch)
        assert float(layer.sensitivities["output_mse"][0]) == pytest.approx(true, rel=1e-4, abs=1e-9)


def test_a_recipe_gives_the_same_model_each_time() -> None:
    recipe = Recipe((("standardised", "plain", "Residual"),), "Cosine", 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = recipe.build(), recipe.build()
    assert all(a.equal(b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
