"""Plans with steps of their own in every backend: codes and outputs, folded or not, or a refusal by name."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpq_plugins as mpq
from mpq_plugins import Adapter, EntropyCoded, LayerChoice, Part, Plan, PluginError, SettingError, Uniform, VerifyError
from mpq_plugins.common import registry
from mpq_plugins.models.folding import fold_batch_norm
from tests.adapters import nets
from tests.helpers.plans import with_layer

pytestmark = pytest.mark.filterwarnings("ignore")  # what backends warn of is theirs

ADAPTERS = ("fx", "pt2e", "torchao", "brevitas", "inc", "inc_classic")
IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
BATCHES = list(IMAGES.split(8))
WIDE: dict[str, Any] = {"bits": 8, "scheme": EntropyCoded(step=0.03)}
NARROW: dict[str, Any] = {"bits": 4, "scheme": EntropyCoded(step=0.07, rounding_offset=0.2)}
OWN: dict[str, Any] = {"bits": 8, "scheme": EntropyCoded()}
PARTS: dict[str, Any] = {
    "bits": None,
    "parts": (Part(bits=5, channels=(0, 3)), Part(bits=8, channels=(1, 2, 4, 5, 6, 7))),
    "scheme": EntropyCoded(step=0.025, rounding_offset=0.5),
}


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(params=ADAPTERS)
def adapter(request: pytest.FixtureRequest) -> Adapter:
    try:
        loaded: Adapter = registry.load("adapters", request.param)
    except PluginError as error:
        pytest.skip(f"{request.param}: its backend is not in this environment ({str(error)[-60:]})")
    return loaded


def net() -> nn.Module:
    """BatchNorms with gains below 0 and at 0, a channel of zeros, and a constant one."""
    model = nets.made(nets.SmallNet)
    assert isinstance(model, nets.SmallNet)
    with torch.no_grad():
        model.bn1.weight[::2].neg_()
        model.bn2.weight[1] = 0
        model.conv2.weight[2] = 0
        model.fc.weight[3] = 0.11
    return model


def planned(model: nn.Module, fold_bn: bool, **layers: dict[str, Any]) -> Plan:
    """A plan with what is given for each layer, and a promise, which no backend is asked to keep."""
    plan = Uniform(bits=8)(mpq.measure(model, EntropyCoded(), (8,), fold_bn=fold_bn))
    for name, changes in layers.items():
        plan = with_layer(plan, name, **({"coded_bytes": 40} | changes))
    return plan


def for_backend(plan: Plan, adapter: Adapter) -> Plan:
    """The plan with 8-bit activations where the backend has no others; its layers as they are."""
    legal, changes = mpq.legalise(plan, adapter.CAPABILITIES)
    assert {change.layer for change in changes} <= {"activations"}
    assert legal.with_activations(None).layers == plan.with_activations(None).layers
    return legal


def by_hand(weight: Tensor, layer: LayerChoice) -> Tensor:
    """sign(w) floor(|w| / step + offset) step."""
    scheme = layer.scheme
    assert isinstance(scheme, EntropyCoded)
    if scheme.step is None:
        steps = weight.flatten(1).abs().amax(1) / (2 ** (layer.bits or 8) // 2 - 1)
        steps = torch.where(steps == 0, 1.0, steps).reshape(-1, *(1 for _ in weight.shape[1:]))
        return torch.floor(weight.abs() / steps + 0.5) * steps * weight.sign()
    return torch.floor(weight.abs() / scheme.step + scheme.rounding_offset) * scheme.step * weight.sign()


def outputs(model: nn.Module, plan: Plan) -> Tensor:
    """What the plan comes to, of the model that was measured, all by hand."""
    made: Any = fold_batch_norm(model) if plan.fold_bn else copy.deepcopy(model)
    with torch.no_grad():
        for layer in plan.layers:
            weight = made.get_submodule(layer.name).weight
            weight.copy_(by_hand(weight, layer))
        given: Tensor = made(IMAGES)
    return given


PLANS: dict[str, dict[str, dict[str, Any]]] = {
    "8 bits": {"conv1": WIDE, "conv2": WIDE, "fc": WIDE},
    "mixed": {"conv1": NARROW, "conv2": PARTS, "fc": WIDE},
    "without steps": {"conv1": OWN, "conv2": OWN, "fc": OWN},
}


@pytest.mark.parametrize("fold_bn", [False, True], ids=["unfolded", "folded"])
@pytest.mark.parametrize("layers", PLANS)
def test_codes_and_outputs_are_the_plans(adapter: Adapter, layers: str, fold_bn: bool) -> None:
    model = net()
    plan = for_backend(planned(model, fold_bn, **PLANS[layers]), adapter)
    adapter.check(plan, model)
    quantized = adapter.apply(model, plan, BATCHES)
    checks = adapter.verify(quantized, plan, model, batch=BATCHES[0])
    assert {check.layer: check.bits for check in checks} == {layer.name: layer.widths for layer in plan.layers}
    expected = outputs(model, plan)
    with torch.no_grad():
        distance = float((getattr(quantized, "model", quantized)(IMAGES[:8]) - expected[:8]).norm() / expected.norm())
    assert distance < (0.03 if plan.quantizes_inputs else 1e-5)


@pytest.mark.parametrize("layers", PLANS)
def test_folding_mirrors_codes_and_stretches_steps(layers: str) -> None:
    """Codes that FX stores: those of the weights as they were measured, times the sign of what BatchNorm multiplies."""
    fx = pytest.importorskip("mpq_plugins.adapters.fx")
    model: Any = net()
    plan = planned(model, False, **PLANS[layers]).with_activation_bits(8)
    converted = fx.apply(model, plan, BATCHES)
    for name, norm in (("conv1", model.bn1), ("conv2", model.bn2)):
        layer, weight = plan.by_name[name], model.get_submodule(name).weight.detach()
        factor = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
        stored = converted.get_submodule(name).weight()
        found, expected = stored.dequantize(), by_hand(weight, layer) * factor[:, None, None, None]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
        step = getattr(layer.scheme, "step", None)
        if step is not None:
            codes = (by_hand(weight, layer) / step).round() * factor.sign()[:, None, None, None]
            assert stored.int_repr().equal(codes.to(torch.int8))
            scales = torch.where(factor == 0, 1.0, step * factor.abs())
            torch.testing.assert_close(stored.q_per_channel_scales().float(), scales, rtol=1e-5, atol=0)


@pytest.mark.parametrize("other", [EntropyCoded(step=0.03, rounding_offset=0.5), EntropyCoded(step=0.0301)], ids=repr)
def test_another_step_or_dead_zone_is_seen(adapter: Adapter, other: EntropyCoded) -> None:
    model = net()
    plan = for_backend(planned(model, False, **PLANS["8 bits"]), adapter)
    quantized = adapter.apply(model, plan, BATCHES)
    with pytest.raises(VerifyError, match="conv2"):
        adapter.verify(quantized, with_layer(plan, "conv2", scheme=other), model)


def test_a_step_too_small_names_the_layer_and_the_least(adapter: Adapter) -> None:
    model = net()
    plan = for_backend(planned(model, False, conv1=WIDE, conv2=WIDE | {"scheme": EntropyCoded(step=1e-3)}), adapter)
    with pytest.raises(SettingError) as raised:
        adapter.apply(model, plan, BATCHES)
    assert_said(str(raised.value), model)


def assert_said(message: str, model: Any) -> None:
    said = re.search(r"layer 'conv2': step: 0\.001 is so small .* (\S+) is the least step for it", message)
    assert said is not None, message
    largest = float(model.conv2.weight.abs().max())
    assert largest / float(said[1]) + 0.4 < 128 <= largest / (float(said[1]) * 0.9999) + 0.4


def test_a_step_too_small_is_refused_without_a_backend(nowhere: Path) -> None:
    model = net()
    plan = planned(model, False, conv2=WIDE | {"scheme": EntropyCoded(step=1e-3), "coded_bytes": None})
    attempts: list[Any] = [
        lambda: mpq.apply(model, plan),
        lambda: mpq.compress(model, plan, nowhere / "net.mpq"),
        lambda: mpq.verify(model, plan, model),
        lambda: mpq.correct(model, plan, BATCHES),
        lambda: mpq.reconstruct(model, plan, BATCHES, steps=2),
    ]
    for attempt in attempts:
        with pytest.raises(SettingError) as raised:
            attempt()
        assert_said(str(raised.value), model)
    assert not [*nowhere.iterdir()]


class Text(nn.Module):
    """An embedding whose weight an output layer shares; (N, T) -> (N, T, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.hidden(self.embedding(tokens))))
        return logits


def test_tied_weights_and_embeddings(adapter: Adapter) -> None:
    if "embedding" not in adapter.CAPABILITIES.kinds:
        pytest.skip("it has no embeddings")
    tokens = torch.arange(12).reshape(2, 6)
    model = nets.made(Text)
    plan = Uniform(bits=8)(mpq.measure(model, EntropyCoded(), (8,)))
    for layer, step in zip(plan.layers, (0.04, 0.011), strict=True):
        plan = with_layer(plan, layer.name, scheme=EntropyCoded(step=step), coded_bytes=30)
    quantized = adapter.apply(model, for_backend(plan, adapter), [tokens])
    adapter.verify(quantized, plan, model, batch=tokens)
    with torch.no_grad():
        found = getattr(quantized, "model", quantized)(tokens)
    assert torch.allclose(found, mpq.apply(model, plan)(tokens), atol=1e-6)


# ---- what finds scales of its own


def linear_plan() -> tuple[nn.Module, Plan]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    plan = Uniform(bits=8)(mpq.measure(model, EntropyCoded(), (8,)))
    return model, with_layer(plan, "2", scheme=EntropyCoded(step=0.01), coded_bytes=700)


def test_the_compressors_own_rtn_refuses_by_name_and_both_remedies_work() -> None:
    inc = pytest.importorskip("mpq_plugins.adapters.inc")
    model, plan = linear_plan()
    with pytest.raises(
        SettingError,
        match=r"^'0', '2': entropy-coded, and Neural Compressor's RTN finds scales of its own\. Use apply\(\), "
        r"which is exact, or legalise\(plan, inc\.RTN_CAPABILITIES\), which makes them affine$",
    ):
        inc.to_inc(plan, model=model)
    inc.verify(inc.apply(model, plan), plan, model)
    legal, _ = mpq.legalise(plan, inc.RTN_CAPABILITIES)
    assert inc.to_inc(legal, model=model).name == "rtn"


def test_torchaos_stock_config_refuses_by_name_and_both_remedies_work() -> None:
    torchao = pytest.importorskip("mpq_plugins.adapters.torchao")
    config = pytest.importorskip("mpq_plugins.adapters.torchao.config")
    model, plan = linear_plan()
    with pytest.raises(SettingError, match=r"^'0', '2': entropy-coded, and torchao's .* Use apply\(\), which is exact"):
        torchao.to_config(plan, model)
    torchao.verify(torchao.apply(model, plan), plan, model)
    legal, _ = mpq.legalise(plan, config.CONFIG_CAPABILITIES)
    assert len(torchao.to_config(legal, model).fqn_to_config) == 2


def test_half_precision_in_torchao_is_what_apply_makes() -> None:
    torchao = pytest.importorskip("mpq_plugins.adapters.torchao")
    model, plan = linear_plan()
    for dtype in (torch.float16, torch.bfloat16):
        half = copy.deepcopy(model).to(dtype)
        own = plan.model_copy(update={"model": mpq.measure(half, EntropyCoded(), (8,)).fingerprint})
        quantized: Any = torchao.apply(half, own)
        torchao.verify(quantized, own, half, batch=torch.ones(2, 32, dtype=dtype))
        assert quantized[2].weight.dequantize().to(dtype).equal(mpq.apply(half, own)[2].weight)  # type: ignore[index]


# ---- training and tuning


def test_fx_trains_at_the_plans_step_folded_weights_too() -> None:
    fx = pytest.importorskip("mpq_plugins.adapters.fx")
    from torch.ao.quantization.quantize_fx import convert_fx

    model = net()
    plan = planned(model, False, **PLANS["mixed"]).with_activation_bits(8)
    made = fx.prepare(model, plan, IMAGES[:1], qat=True, activation_observer="moving_average")
    before = fx.folded_integers(plan, model)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.5)
    with torch.no_grad():
        made.get_submodule("conv1").weight.mul_(9)  # beyond the last code
    for _ in range(6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(made(IMAGES), torch.arange(16) % 10).backward()
        optimizer.step()
    integers = fx.finish_qat(made)
    for name, after in integers.items():
        torch.testing.assert_close(after.scale, before[name].scale, rtol=1e-6, atol=0)
        assert not after.codes.equal(before[name].codes)
    conv1 = {*integers["conv1"].codes.flatten().tolist()}
    assert (min(conv1), max(conv1)) == (-7, 7)
    fx.verify(convert_fx(made), plan, model, integers)


def brevitas_model() -> tuple[Any, nn.Module, Plan, Any]:
    brevitas = pytest.importorskip("mpq_plugins.adapters.brevitas")
    model = net()
    plan = planned(model, False, conv1=WIDE | {"scheme": EntropyCoded(step=0.15)}, conv2=NARROW, fc=WIDE)
    return brevitas, model, plan, brevitas.to_brevitas(model, plan)


def codes(model: Any) -> dict[str, Tensor]:
    from mpq_plugins.adapters.brevitas.read import weight_codes

    return {name: weight_codes(model.get_submodule(name)).codes for name in ("conv1", "conv2", "fc")}


@pytest.mark.parametrize("tune", ["gptq", "gpfq", "learned_round"])
def test_brevitas_tunes_from_the_float_weights_and_its_codes_last(tune: str, nowhere: Path) -> None:
    brevitas, model, plan, quantized = brevitas_model()
    before = codes(quantized)
    settings = {"steps": 60, "lr": 1e-2} if tune == "learned_round" else {}
    tuned = getattr(brevitas, tune)(quantized, BATCHES, **settings)
    brevitas.verify_tuned(tuned, plan)
    exact = model(IMAGES)
    found, nearest = (float((made(IMAGES) - exact).norm()) for made in (tuned, mpq.apply(model, plan)))
    assert found < nearest
    assert any(not codes(tuned)[name].equal(before[name]) for name in before)
    if tune == "learned_round":
        assert max(float((codes(tuned)[name] - before[name]).abs().max()) for name in before) <= 1
    weights = {name: tuned.get_submodule(name).weight.clone() for name in before}
    for name, weight in weights.items():  # what was rounded rounds to itself
        assert tuned.get_submodule(name).quant_weight().value.equal(weight)
    brevitas.save(tuned, plan, nowhere / "net.safetensors")
    loaded = brevitas.load(nowhere / "net.safetensors", model)
    assert all(loaded.get_submodule(name).quant_weight().value.equal(weight) for name, weight in weights.items())


def test_a_block_that_learns_nothing_keeps_the_plans_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    brevitas, _, _, quantized = brevitas_model()
    before = codes(quantized)
    with pytest.raises(SettingError, match="learned_round changed no code"):
        brevitas.learned_round(quantized, BATCHES, steps=1, lr=1e-9)
    assert all(codes(quantized)[name].equal(before[name]) for name in before)


def test_training_in_brevitas_keeps_the_dead_zone_and_moves_weights_of_0() -> None:
    brevitas, model, plan, quantized = brevitas_model()
    with torch.no_grad():
        quantized.fc.weight[0] = 0
    trained = brevitas.train(quantized, BATCHES, brevitas.distillation(model), epochs=3, lr=1e-2)
    brevitas.verify_tuned(trained, plan)
    assert trained.fc.weight[0].any()
    scale = trained.conv1.weight_quant.scale()
    expected = torch.floor(trained.conv1.weight.abs() / scale + 0.4) * trained.conv1.weight.sign()
    assert codes(trained)["conv1"].equal(expected.clamp(-127, 127))


@pytest.mark.parametrize("format", ["torch_qcdq", "onnx_qcdq", "qonnx"])
def test_brevitas_exports_the_plans_weights(format: str, nowhere: Path) -> None:
    pytest.importorskip("onnxruntime")
    brevitas, model, plan, quantized = brevitas_model()
    brevitas.export(quantized, plan, nowhere / "net", IMAGES, format=format)
    brevitas.verify(quantized, plan, model, batch=IMAGES)


def test_layerwise_quantize_gives_the_same() -> None:
    brevitas, model, plan, quantized = brevitas_model()
    from brevitas.graph.quantize import layerwise_quantize

    mine = layerwise_quantize(copy.deepcopy(model), compute_layer_map=brevitas.layer_map(plan, model))
    brevitas.verify(mine, plan, model, batch=IMAGES)
    assert mine(IMAGES).equal(quantized(IMAGES))


def test_ternary_weights_are_affine_alone() -> None:
    brevitas, model, plan, _ = brevitas_model()
    coded = with_layer(plan, "fc", bits=2, scheme=EntropyCoded(step=0.3))
    with pytest.raises(
        SettingError, match=r"ternary: layer 'fc' has 2 bits, entropy-coded, step 0\.3; ternary weights"
    ):
        brevitas.to_brevitas(model, coded, ternary="fc")
