"""A pretrained network through the classic Neural Compressor: `make classic` runs this in an environment of its own."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.utils.data import DataLoader

from examples.cifar_resnet import evaluate, images, resnet
from mpq_plugins import PTILMPQ, Affine, MixQuant, Uniform, measure
from mpq_plugins import apply as simulated
from tests.adapters.compressor import same
from tests.conftest import Ran

pytestmark = [
    pytest.mark.usefixtures("zoo"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
]
pytest.importorskip(
    "neural_compressor.strategy", reason="the classic Neural Compressor is in an environment of its own: make classic"
)
classic = pytest.importorskip("mpq_plugins.adapters.inc_classic")
compressor = pytest.importorskip("neural_compressor")


def conf(strategy: str, approach: str = "weight_only", **parameters: Any) -> Any:
    return compressor.PostTrainingQuantConfig(
        approach=approach, quant_level=1, tuning_criterion=classic.TuningCriterion(strategy, parameters)
    )


def accuracy() -> Callable[[nn.Module], float]:
    pictures, labels = images("calib_1024.npz")
    return lambda net: evaluate(net, pictures[:512], labels[:512])[0]


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_weights_are_our_fake_quantization_to_the_bit(granularity: Any) -> None:
    net = resnet(20)
    table = measure(net, Affine(granularity=granularity), range(1, 9), fold_bn=False)
    for allocator in (Uniform(bits=8), Uniform(bits=3), Uniform(bits=1), MixQuant(qem=2.0), PTILMPQ()):
        plan = allocator(table)
        q_model = classic.apply(net, plan)
        assert same(q_model.model, simulated(net, plan))
        assert len(classic.verify(q_model, plan, net)) == 20


@pytest.mark.parametrize("strategy", ["mixquant", "ptilmpq"])
def test_tuning_resnet20_to_one_percent(strategy: str) -> None:
    net = resnet(20)
    before = copy.deepcopy(net)
    parameters: dict[str, Any] = (
        {"qem": [1.5, 4, 3, 2]}
        if strategy == "mixquant"
        else {"alpha": [0.5, 0.0], "important_bits": (5, 4), "other_bits": [(4, 3), (2, 2)]}
    )
    q_model = classic.fit(net, conf(strategy, **parameters), eval_func=accuracy())
    run, plan = classic.tuning_of(q_model), classic.plan_of(q_model)
    assert [trial.met for trial in run.trials] == [False] * (len(run.trials) - 1) + [True]
    assert {trial.plan.allocator.name for trial in run.trials} == {strategy}
    uniform = Uniform(bits=8)(measure(net, bits=(8,), fold_bn=False))
    assert plan.size().total_bits < 0.9 * uniform.size().total_bits
    assert evaluate(q_model.model, *images())[0] > 90.0
    assert same(net, before)
    classic.verify(q_model, plan, net)


def test_static_int8_with_the_sensitive_layers_in_fp32() -> None:
    net = resnet(20)
    pictures, labels = images("calib_1024.npz")
    batches: Any = list(zip(pictures[:128], labels[:128], strict=True))
    loader = DataLoader(batches, batch_size=64)
    setting = conf("mixquant", approach="static", qem=2.0, int8_below=7)
    q_model = classic.fit(net, setting, calib_dataloader=loader, eval_func=accuracy())
    by_mixquant = MixQuant(qem=2.0)(measure(net, bits=range(2, 9), fold_bn=False))
    wanted = {layer.name for layer in by_mixquant.layers if layer.bits is not None and layer.bits < 7}
    checks = classic.verify(q_model, classic.plan_of(q_model), net)
    assert {check.layer for check in checks if check.activation_bits == 8} == wanted
    assert len(wanted) == 9
    assert evaluate(q_model.model, *images())[0] > 91.0


def test_mpq_tune_is_quiet_and_leaves_the_plan_alone_behind(
    mpq: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zoo: Path
) -> None:
    monkeypatch.setattr("examples.cifar_resnet.ZOO", (zoo / "cifar10").absolute())
    arguments = ("examples.cifar_resnet:resnet20", "--eval", "examples.cifar_resnet:score", "--qem", "1.5,3,4")
    monkeypatch.chdir(tmp_path)
    ran = mpq("tune", *arguments, "--granularity", "per_channel", "--backend", "inc_classic", "-o", "plan.json", "-q")
    assert (ran.code, ran.err) == (0, "")
    assert "mixquant qem=4.0" in ran.out
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
