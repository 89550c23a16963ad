"""The contract, over all adapters that are installed: the same door, and behind it what each of them proves."""

import inspect
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.plugins.adapter import mpq_halves as halves
from mpq_plugins import (
    Adapter,
    Affine,
    Capabilities,
    EntropyCoded,
    LayerCheck,
    MismatchError,
    MPQError,
    Piecewise,
    Plan,
    PluginError,
    SettingError,
    Uniform,
    legalise,
    measure,
)
from mpq_plugins.common import registry
from tests.adapters import nets
from tests.conftest import Ran
from tests.helpers.distributions import install
from tests.helpers.nets import tied_net

pytestmark = pytest.mark.filterwarnings("ignore")  # what backends warn of is theirs

CODE = Path(halves.__file__).read_text()
OURS = sorted({entry.name for entry in entry_points(group="mpq_plugins.adapters")})
BATCHES = list(torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(8))
SYMMETRIC = Affine(granularity="per_channel", symmetric=True)
SCHEMES = (SYMMETRIC, Affine(), Piecewise(granularity="per_channel"), EntropyCoded(), EntropyCoded(step=0.06),
           Affine(symmetric="full", granularity="per_channel", scale_dtype="float16"),
           Affine(granularity="per_channel", symmetric=True, stochastic=7), Affine(stochastic=7))  # fmt: skip


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path, with somebody else's adapter in it."""
    path = tmp_path / "site"
    path.mkdir()
    monkeypatch.syspath_prepend(path)
    monkeypatch.chdir(tmp_path)
    install(path, "mpq-halves", CODE, {"adapters": {"halves": ""}})
    yield path
    for module in [name for name in sys.modules if name.startswith("mpq_") and not name.startswith("mpq_plugins")]:
        del sys.modules[module]


def test_an_outsiders_uses_public_names_alone() -> None:
    imported = [line for line in CODE.splitlines() if "import" in line and "mpq_plugins" in line]
    assert imported == ["import mpq_plugins as mpq"]
    known: Adapter = halves
    assert known.CAPABILITIES.backend == "halves"


@pytest.fixture(params=[*OURS, "halves"])
def adapter(request: pytest.FixtureRequest) -> Adapter:
    try:
        loaded: Adapter = registry.load("adapters", request.param)
    except PluginError as error:
        pytest.skip(f"{request.param}: its backend is not in this environment ({str(error)[-60:]})")
    return loaded


def plans(model: nn.Module) -> list[Plan]:
    """Plans of 4 bits, of several schemes, with activations in floating point and at 8 bits."""
    made = [Uniform(bits=4)(measure(model, scheme, (4,))) for scheme in SCHEMES]
    return [plan.with_activation_bits(bits) for plan in made for bits in (None, 8)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_doors_are_alike(adapter: Adapter) -> None:
    assert isinstance(adapter.CAPABILITIES, Capabilities)
    for function, names in (
        (adapter.check, ["plan", "model"]),
        (adapter.apply, ["model", "plan", "batches"]),
        (adapter.verify, ["quantized", "plan", "model", "batch"]),
    ):
        parameters = inspect.signature(function).parameters
        assert [name for name in parameters if name in names] == names
        assert [*parameters][: len(names) - 1] == names[:-1]
        assert all(p.default is not p.empty for name, p in parameters.items() if name not in names)
    assert inspect.signature(adapter.verify).parameters["batch"].kind is inspect.Parameter.KEYWORD_ONLY


def test_what_it_can_run_is_applied_to_a_copy_and_verified(adapter: Adapter) -> None:
    model = nets.made(nets.SmallNet)
    before = state(model)
    legal = {legalise(plan, adapter.CAPABILITIES)[0].to_json(): plan for plan in plans(model)}
    for document in legal:
        plan = Plan.model_validate_json(document)
        adapter.check(plan, model)
        quantized = adapter.apply(model, plan, BATCHES)
        checks = adapter.verify(quantized, plan, model, batch=BATCHES[0])
        assert all(type(check) is LayerCheck for check in checks)
        assert {check.layer: check.bits for check in checks} == {
            layer.name: layer.widths for layer in plan.layers if not layer.in_float
        }
        assert {check.layer: check.activation_bits for check in checks} == {
            layer.name: layer.activation_bits for layer in plan.layers if not layer.in_float
        }
        assert {check.ties for check in checks} == {0}
        assert not model.training
        assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("given", [3, None, "net.pt", {}, nn.Linear], ids=repr)
def test_what_is_no_network_is_refused_by_name(adapter: Adapter, given: Any) -> None:
    if adapter.CAPABILITIES.backend == "halves":
        pytest.skip("what somebody else's says is its own")
    model = nets.made(nets.SmallNet)
    plan = legalise(plans(model)[0], adapter.CAPABILITIES)[0]
    said = f"is a {type(given).__name__}, no module; give the network itself"
    if given is nn.Linear:
        said = "is the class Linear, no module; give one that is made of it"
    with pytest.raises(SettingError, match=f"^quantized: {said}$"):
        adapter.verify(given, plan, model)
    with pytest.raises(SettingError, match=f"^model: {said}$"):
        adapter.verify(torch.fx.symbolic_trace(model), plan, given)


def test_what_check_refuses_apply_refuses_in_the_same_words(adapter: Adapter) -> None:
    model = nets.made(nets.SmallNet)
    for plan in plans(model):
        refusal = None
        try:
            adapter.check(plan, model)
        except (SettingError, MismatchError) as error:
            refusal = error
        if refusal is not None:
            with pytest.raises(type(refusal)) as raised:
                adapter.apply(model, plan, BATCHES)
            assert str(raised.value) == str(refusal)
            assert "\n" not in str(refusal)
            assert "'" in str(refusal) or "plan" in str(refusal)  # it names layers, or what of the plan


def test_another_models_plan_and_a_model_in_float(adapter: Adapter) -> None:
    model = nets.made(nets.SmallNet)
    plan = legalise(plans(model)[0], adapter.CAPABILITIES)[0]
    with pytest.raises(MismatchError, match="another model"):
        adapter.check(plan, tied_net())
    with pytest.raises(MismatchError, match="another model"):
        adapter.apply(tied_net(), plan, BATCHES)
    with pytest.raises(MPQError):
        adapter.verify(model, plan, model)


def test_inputs_that_it_needs_and_lacks_are_asked_for(adapter: Adapter) -> None:
    model = nets.made(nets.SmallNet)
    for plan in (legalise(plan, adapter.CAPABILITIES)[0] for plan in plans(model)[:2]):
        try:
            quantized = adapter.apply(model, plan)
        except SettingError as error:
            assert str(error).startswith("batches: none given, and")  # noqa: PT017
        else:
            adapter.verify(quantized, plan, model)


def test_legalise_and_check_go_by_an_outsiders_capabilities(mpq: Any, tmp_path: Path) -> None:
    (tmp_path / "site" / "mpq_net.py").write_text(
        "from tests.adapters import nets\n\n\ndef made():\n    return nets.made(nets.SmallNet)\n"
    )
    plan = Uniform(bits=3)(measure(nets.made(nets.SmallNet), Affine(granularity="per_channel"), (3,)))
    plan.save(tmp_path / "plan.json")
    listed: Ran = mpq("plugins")
    assert "halves" in listed.out
    assert "mpq-halves" in listed.out
    ran: Ran = mpq(
        "check", tmp_path / "plan.json", "mpq_net:made", "--backend", "halves", "-o", tmp_path / "legal.json"
    )
    assert ran.code == 0, ran.err
    assert "conv1" in ran.out
    legal, model = Plan.load(tmp_path / "legal.json"), nets.made(nets.SmallNet)
    assert {layer.bits for layer in legal.layers} == {4}
    outside: Adapter = registry.load("adapters", "halves")
    assert len(outside.verify(outside.apply(model, legal), legal, model)) == 3
    with pytest.raises(SettingError, match="halves cannot run this plan as it is: 'conv1': 3 bits"):
        outside.check(plan, model)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (CODE.replace("def verify(", "def proven("), "lacks verify"),
        (CODE.replace("def check(", "def may(").replace("CAPABILITIES = ", "CAN = "), "lacks CAPABILITIES, check"),
        ("import no_such_backend\n", "no_such_backend"),
        ("raise SystemExit(3)\n", "SystemExit"),
    ],
)
def test_a_broken_adapter_is_named_and_in_nobodys_way(
    site: Path, tmp_path: Path, mpq: Any, code: str, said: str
) -> None:
    install(site, "mpq-broken", code, {"adapters": {"broken": ""}})
    with pytest.raises(PluginError) as raised:
        registry.load("adapters", "broken")
    message = str(raised.value)
    assert "'broken' of mpq-broken" in message
    assert said in message
    assert "\n" not in message
    assert registry.load("adapters", "halves").CAPABILITIES.backend == "halves"
    assert {"broken", "halves", "fx"} <= {plugin.name for plugin in registry.installed() if plugin.group == "adapters"}
    plan = Uniform(bits=4)(measure(nets.made(nets.SmallNet), Affine(granularity="per_channel"), (4,)))
    plan.save(tmp_path / "plan.json")
    ran: Ran = mpq("check", tmp_path / "plan.json", "tests.adapters.nets:SmallNet", "--backend", "broken")
    assert ran.code != 0
    assert ran.err.startswith("mpq: error: adapters: 'broken' of mpq-broken")
    assert ran.err.count("\n") == 1
