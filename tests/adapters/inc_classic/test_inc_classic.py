"""The classic Neural Compressor: strategies, weights to the bit, int8 and fp32, and every silence as an error.

It cannot share an environment with its successor: `make classic` builds one and runs this there.
"""

import copy
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from mpq_plugins import PTILMPQ, Affine, MixQuant, Plan, Uniform, measure
from mpq_plugins import apply as simulated
from mpq_plugins.errors import MismatchError, MPQError, SettingError, SourceError, TuningError, VerifyError
from tests.adapters import nets
from tests.adapters.compressor import Heard, same
from tests.helpers.nets import tied_net

pytest.importorskip(
    "neural_compressor.strategy", reason="the classic Neural Compressor is in an environment of its own: make classic"
)
classic = pytest.importorskip("mpq_plugins.adapters.inc_classic")
compressor = pytest.importorskip("neural_compressor")

pytestmark = [
    pytest.mark.usefixtures("nowhere"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
]
PER_CHANNEL = Affine(granularity="per_channel")
BATCHES: Any = [(torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)), 0) for i in range(8)]

IMAGES = torch.stack([image for image, _ in BATCHES])


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compressor.config.options, "_workspace", str(tmp_path / "workspace"))


FP32 = {"weight": {"dtype": ["fp32"]}}


def having(setting: Any, name: str, value: Any) -> Any:
    setattr(setting, name, value)
    return setting


def conf(
    strategy: str = "mixquant", approach: str = "weight_only", loss: float = 0.01, max_trials: int = 100,
    timeout: float = 0, **parameters: Any,
) -> Any:  # fmt: skip
    return compressor.PostTrainingQuantConfig(
        approach=approach,
        quant_level=1,
        tuning_criterion=classic.TuningCriterion(strategy, parameters, timeout, max_trials),
        accuracy_criterion=compressor.config.AccuracyCriterion(tolerable_loss=loss),
    )


def by_levels(model: nn.Module) -> float:
    """A score that rises with the number of different weights."""
    return float(sum(weight.unique().numel() for name, weight in model.named_parameters() if weight.dim() > 1))


# ---- weights


@pytest.mark.parametrize("scheme", [Affine(), PER_CHANNEL, Affine(granularity="per_channel", symmetric=True)], ids=str)
@pytest.mark.parametrize("bits", [8, 4, 1])
def test_uniform_weights_to_the_bit(scheme: Affine, bits: int) -> None:
    model = nets.made(nets.SmallNet)
    plan = Uniform(bits=bits)(measure(model, scheme, (bits,)))
    q_model = classic.apply(model, plan)
    assert same(q_model.model, simulated(model, plan))
    assert classic.plan_of(q_model) == plan
    assert [check.bits for check in classic.verify(q_model, plan, model, batch=IMAGES)] == [
        layer.widths for layer in plan.layers
    ]


def test_mixed_weights_with_parts_and_two_regions() -> None:
    model = nets.made(nets.SmallNet)
    for allocator in (MixQuant(qem=3.0), PTILMPQ(alpha=0.5)):
        scheme = allocator.needs.scheme or PER_CHANNEL
        plan = allocator(measure(model, scheme, allocator.needs.bits, fold_bn=False))
        assert same(classic.apply(model, plan).model, simulated(model, plan))


def test_a_strategy_is_its_allocator() -> None:
    model = nets.made(nets.SmallNet)
    q_model = compressor.quantization.fit(model, conf("mixquant", qem=3.0, scheme=PER_CHANNEL))
    plan = MixQuant(qem=3.0)(measure(model, PER_CHANNEL, range(2, 9), fold_bn=False))
    assert classic.plan_of(q_model).layers == plan.layers
    assert {kind for _, kind in q_model.q_config["op"]} == {"Conv2d", "Linear"}
    assert [own["weight"]["bits"] for own in q_model.q_config["op"].values()] == [layer.bits for layer in plan.layers]
    q_model = classic.fit(model, conf("ptilmpq", alpha=0.5, important_bits=(4, 2), other_bits=(3, 2)))
    assert any(layer.parts for layer in classic.plan_of(q_model).layers)


def test_a_plan_from_its_file_and_tied_weights(tmp_path: Path) -> None:
    model = tied_net()
    plan = Uniform(bits=3)(measure(model, PER_CHANNEL, (3,)))
    plan.save(tmp_path / "plan.json")
    q_model = classic.fit(model, conf("plan", plan=tmp_path / "plan.json"))
    assert q_model.model.lm_head.weight is q_model.model.embed.weight
    classic.verify(q_model, plan, model, batch=torch.arange(20)[None])


def test_saved_by_the_compressor(tmp_path: Path) -> None:
    model = nets.made(nets.SmallNet)
    plan = Uniform(bits=3)(measure(model, PER_CHANNEL, (3,)))
    classic.apply(model, plan).save(str(tmp_path / "saved"))
    again = nets.made(nets.SmallNet)
    again.load_state_dict(torch.load(tmp_path / "saved" / "best_model.pt", weights_only=True))
    classic.verify(again, plan, model, batch=IMAGES)


# ---- tuning


def test_trials_go_up_from_the_smallest_by_our_strategy_and_stop_at_the_first_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nets.made(nets.SmallNet)
    before = copy.deepcopy(model)
    called: list[Any] = []
    own = classic.MixQuantTuneStrategy.next_tune_cfg

    def counted(self: Any) -> Any:
        called.append(self)
        return own(self)

    monkeypatch.setattr(classic.MixQuantTuneStrategy, "next_tune_cfg", counted)
    q_model = classic.fit(model, conf(loss=0.5, qem=[1.5, 30, 8, 3]), eval_func=by_levels)
    run = classic.tuning_of(q_model)
    assert [type(strategy) for strategy in called] == [classic.MixQuantTuneStrategy]
    sizes = [trial.plan.size().total_bits for trial in run.trials]
    assert sizes == sorted(sizes)
    assert [trial.met for trial in run.trials] == [False] * (len(sizes) - 1) + [True]
    assert len(sizes) > 1
    assert classic.plan_of(q_model) == run.chosen.plan
    assert same(model, before)
    classic.verify(q_model, run.chosen.plan, model, batch=IMAGES)


def test_every_combination_is_a_trial_and_equal_plans_are_one() -> None:
    score = iter([100.0, *range(50)])
    with pytest.raises(TuningError, match="none of 4 trials"):
        classic.fit(
            nets.made(nets.SmallNet),
            conf(qem=[1e-9, 1e9], bits=[(2, 4, 8), (3, 8), (4, 8)], scheme=PER_CHANNEL),
            eval_func=lambda model: next(score),
        )


@pytest.mark.parametrize("run", ["ours", "theirs"])
def test_an_unreachable_criterion_is_an_error_with_the_best_trial(run: str) -> None:
    model = nets.made(nets.SmallNet)
    before = copy.deepcopy(model)
    fit = classic.fit if run == "ours" else compressor.quantization.fit
    scores = iter([100.0, 60.0, 70.0])
    with pytest.raises(TuningError, match=r"none of 2 trials.*at least 99 \(float 100, .*best is mixquant.*: 70"):
        fit(model, conf(qem=[2, 8]), eval_func=lambda model: next(scores))
    assert same(model, before)


def test_a_lower_score_may_be_better() -> None:
    setting = conf(qem=[2, 8])
    setting.accuracy_criterion = compressor.config.AccuracyCriterion(
        higher_is_better=False, criterion="absolute", tolerable_loss=0.5
    )
    scores = iter([1.0, 2.0, 1.25])
    q_model = classic.fit(nets.made(nets.SmallNet), setting, eval_func=lambda model: next(scores))
    assert [trial.met for trial in classic.tuning_of(q_model).trials] == [False, True]


@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize("run", ["ours", "theirs"])
def test_an_evaluation_that_fails(when: int, run: str) -> None:
    model = nets.made(nets.SmallNet)
    before = copy.deepcopy(model)
    calls: list[int] = []

    def failing(given: nn.Module) -> float:
        calls.append(1)
        if len(calls) > when:
            raise ValueError("no data")
        return 1.0

    fit = classic.fit if run == "ours" else compressor.quantization.fit
    said = "failing of trial 1, mixquant qem=2.0" if when else "failing of the float model"
    with pytest.raises(SourceError, match=f"{said}.*ValueError: no data; .*test_inc_classic.py, line"):
        fit(model, conf(qem=2), eval_func=failing)
    assert same(model, before)


def test_an_interruption_is_one() -> None:
    def interrupted(model: nn.Module) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        classic.fit(nets.made(nets.SmallNet), conf(qem=2), eval_func=interrupted)


def test_an_evaluation_that_changes_the_model_changes_a_copy() -> None:
    model = nets.made(nets.SmallNet)
    before = copy.deepcopy(model)

    def ruinous(given: Any) -> dict[str, float]:
        with torch.no_grad():
            given.fc.weight.zero_()
        given.train()
        return {"accuracy": 1.0, "loss": -1.0}

    q_model = classic.fit(model, conf(qem=2), eval_func=ruinous)
    assert same(model, before)
    classic.verify(q_model, classic.plan_of(q_model), model, batch=IMAGES)
    assert not q_model.model.training


def test_with_a_timeout_too_the_smallest_good_plan_is_kept() -> None:
    model = nets.made(nets.SmallNet)
    q_model = classic.fit(model, conf(loss=0.5, timeout=60, qem=[1.5, 30, 8, 3]), eval_func=by_levels)
    run = classic.tuning_of(q_model)
    assert classic.plan_of(q_model) == run.chosen.plan == run.trials[-1].plan


def test_a_time_that_runs_out_says_so() -> None:
    def slow(model: nn.Module) -> float:
        for _ in range(100):
            time.sleep(0.05)
        return 1.0

    with pytest.raises(TuningError, match="the time ran out before the float model"):
        classic.fit(nets.made(nets.SmallNet), conf(qem=2, timeout=0.3), eval_func=slow)


def test_a_scheme_may_be_its_document() -> None:
    model = nets.made(nets.SmallNet)
    q_model = classic.fit(model, conf(qem=2.0, scheme={"granularity": "per_channel"}))
    assert {layer.scheme for layer in classic.plan_of(q_model).layers} == {PER_CHANNEL}


def test_a_plan_and_a_constraint_that_contradict_each_other() -> None:
    model = nets.made(nets.SmallNet)
    plan = Uniform(bits=4)(measure(model, PER_CHANNEL, (4,)))
    for setting in (
        having(conf("plan", plan=plan), "op_name_dict", {"fc": FP32}),
        conf("plan", plan=plan, skip=["fc"]),
    ):
        with pytest.raises(SettingError, match="'fc': the plan quantizes them, and skip, op_name_dict"):
            classic.fit(model, setting)


def test_arguments_that_do_not_exist_or_do_nothing() -> None:
    model = nets.made(nets.SmallNet)
    for run in (classic.fit, compressor.quantization.fit):
        with pytest.raises(SettingError, match="SmallNet: is in training mode"):
            run(nets.SmallNet(), conf(qem=2), eval_func=by_levels)
        with pytest.raises(SettingError, match="eval_func: is a float, no function"):
            run(model, conf(qem=2), eval_func=1.0)
    with pytest.raises(TypeError, match="eval_fn"):
        classic.fit(model, conf(qem=2), eval_fn=by_levels)
    with pytest.raises(SettingError, match="calib_func"):
        classic.fit(model, conf(qem=2), calib_func=by_levels)
    with pytest.raises(SettingError, match="calib_dataloader: none given"):
        classic.fit(model, conf(approach="static", qem=2))


def test_a_dataloader_and_a_metric_evaluate_too() -> None:
    class Share:
        def __init__(self) -> None:
            self.reset()

        def reset(self) -> None:
            self.count = 0

        def update(self, predictions: Any, labels: Any) -> None:
            self.count += len(labels)

        def result(self) -> float:
            return float(self.count)

    loader = DataLoader(BATCHES, 4)  # Neural Compressor evaluates so with approach="static" alone
    q_model = classic.fit(
        nets.made(nets.SmallNet), conf(approach="static", qem=2), calib_dataloader=loader, eval_dataloader=loader,
        eval_metric=Share(),
    )  # fmt: skip
    assert classic.tuning_of(q_model).baseline == len(BATCHES)


def test_nothing_is_logged_and_nothing_left_behind(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressor.config.options, "_workspace", "./nc_workspace/now")
    handler, logger = Heard(), logging.getLogger("neural_compressor")
    logger.addHandler(handler)
    try:
        classic.fit(nets.made(nets.SmallNet), conf(qem=2), eval_func=lambda model: 1.0)
        assert handler.lines == []
        assert capfd.readouterr() == ("", "")
        assert list(tmp_path.iterdir()) == []
        assert logger.filters == []
        assert compressor.config.options._workspace == "./nc_workspace/now"
        compressor.quantization.fit(nets.made(nets.SmallNet), conf(qem=2), eval_func=lambda model: 1.0)
        assert handler.lines  # without us it does log, and leaves a folder
        assert [path.name for path in tmp_path.iterdir()] == ["nc_workspace"]
    finally:
        logger.removeHandler(handler)


# ---- which layers


def test_layers_that_the_user_keeps_in_float() -> None:
    model = nets.made(nets.SmallNet)
    setting = conf(bits=(3,), baseline=3, skip=("conv2",))
    setting.op_name_dict = {"fc": {"weight": {"dtype": ["fp32"]}}}
    q_model = classic.fit(model, setting)
    plan = classic.plan_of(q_model)
    assert [layer.name for layer in plan.layers] == ["conv1"]
    assert q_model.model.fc.weight.equal(model.get_submodule("fc").weight)
    classic.verify(q_model, plan, model, batch=IMAGES)


@pytest.mark.parametrize("option", ["op_type_dict", "op_name_dict"])
def test_constraints_that_the_strategy_would_override(option: str) -> None:
    setting = conf(qem=2)
    setattr(setting, option, {"fc": {"weight": {"bits": [4]}}})
    with pytest.raises(SettingError, match=rf"{option}\['fc'\]: sets bits, which the strategy decides"):
        classic.fit(nets.made(nets.SmallNet), setting)


# ---- static


def int8_layers(q_model: Any, model: nn.Module) -> set[str]:
    return {
        check.layer
        for check in classic.verify(q_model, classic.plan_of(q_model), model, batch=IMAGES)
        if check.activation_bits == 8
    }


def test_static_gives_int8_below_a_width_and_fp32_from_there() -> None:
    model = nets.made(nets.SmallNet)
    before = copy.deepcopy(model)
    plan = MixQuant(qem=2.0)(measure(model, bits=range(2, 9), fold_bn=False))
    bits = {layer.name: layer.bits or 0 for layer in plan.layers}
    assert len({*bits.values()}) > 1
    loader = DataLoader(BATCHES, 4)
    for below in sorted({*bits.values()}):
        q_model = classic.fit(model, conf(approach="static", qem=2.0, int8_below=below + 1), calib_dataloader=loader)
        assert int8_layers(q_model, model) == {name for name, own in bits.items() if own <= below}
    assert same(model, before)


def test_static_tries_the_plan_with_most_int8_first() -> None:
    model = nets.made(nets.SmallNet)
    scores = iter([100.0, 50.0, 100.0])
    q_model = classic.fit(
        model, conf(approach="static", qem=[1.6, 8.0]), calib_dataloader=DataLoader(BATCHES, 4),
        eval_func=lambda given: next(scores),
    )  # fmt: skip
    first, second = (trial.plan for trial in classic.tuning_of(q_model).trials)
    assert first.size().total_bits < second.size().total_bits
    assert classic.plan_of(q_model) == second
    with pytest.raises(VerifyError, match="runs in float, and the plan says otherwise"):
        classic.verify(q_model, first, model)


@pytest.mark.parametrize("net", [nets.Subclassed, nets.Functional, nets.Reused, nets.Circular])
def test_static_quantizes_what_it_was_told_to_or_says_what_it_did_not(net: type[nn.Module]) -> None:
    model = nets.made(net)
    setting = conf(approach="static", qem=2.0, int8_below=9)
    try:
        q_model = classic.fit(model, setting, calib_dataloader=DataLoader(BATCHES, 4))
    except MPQError as error:
        assert "'fc'" in str(error) or "circular" in str(error)  # noqa: PT017  # either is right, and silence is not
    else:
        assert int8_layers(q_model, model) == {layer.name for layer in classic.plan_of(q_model).layers}


# ---- silences


@pytest.mark.parametrize("level", ["auto", 0])
@pytest.mark.parametrize("run", ["ours", "theirs"])
def test_a_strategy_that_would_be_ignored(level: Any, run: str) -> None:
    setting = conf(qem=2)
    fit = classic.fit if run == "ours" else compressor.quantization.fit
    fit(nets.made(nets.SmallNet), setting)  # once as it should be: that is not remembered
    setting.approach = "dynamic"
    with pytest.raises(SettingError, match="approach"):  # and once as it should not
        fit(nets.made(nets.SmallNet), setting)
    setting.approach, setting.quant_level = "weight_only", level
    with pytest.raises(SettingError, match="quant_level: must be 1 for the strategy 'mixquant'"):
        fit(nets.made(nets.SmallNet), setting)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: conf(qme=2), "strategy_kwargs: has no qme; it has .*qem"),
        (lambda: conf(qem=-1), "qem: -1 is not allowed"),
        (lambda: conf(qem=2, int8_below=8), "has no int8_below"),
        (lambda: conf(approach="static", qem=2, int8_below=0), "int8_below: 0 is not allowed; 1 to 9"),
        (lambda: conf(qem=2, skip="fc"), "skip: 'fc' is not allowed; a list of globs"),
        (lambda: conf(qem=2, skip=[3]), "skip: "),
        (lambda: conf(qem=2, scheme="x"), "scheme: "),
        (lambda: conf(qem=2, scheme={"name": "no"}), "scheme: "),
        (lambda: having(conf(qem=2), "op_name_dict", {"conv": FP32}), r"op_name_dict\['conv'\].*matches none whole"),
        (lambda: having(conf(qem=2), "op_name_dict", {"fc(": FP32}), r"op_name_dict\['fc\('\]: is no regular"),
        (lambda: having(conf(qem=2), "op_type_dict", {"LSTM": FP32}), r"op_type_dict\['LSTM'\].*there are 'Conv2d'"),
        (lambda: having(conf(qem=2), "recipes", {"rtn_args": {"enable_mse_search": True}}), "recipes: rtn_args"),
        (lambda: conf(qem=2, max_trials=0), "max_trials: 0 is not allowed"),
        (lambda: having(conf(), "tuning_criterion", classic.TuningCriterion("mixquant", "x")), "strategy_kwargs: is a"),
        (lambda: 3, "conf: is a int; a PostTrainingQuantConfig"),
        (lambda: conf(qem=2, skip=("absent",)), "skip: 'absent' matches none"),
        (lambda: conf(qem=[]), "plans: none given"),
        (lambda: conf(qem=[2, 8]), "eval_func: none given, and there are 2 plans"),
        (lambda: conf(approach="dynamic", qem=2), "approach: 'post_training_dynamic_quant' is not allowed"),
        (lambda: conf("plan"), "plans: none given"),
        (lambda: conf("plan", plan="absent.json"), "absent.json: cannot read it"),
        (lambda: conf("plan", plan=4), "plan: is a int"),
        (lambda: conf("plan", plan=other_plan()), "Missing here"),
        (lambda: conf("basic"), "strategy: 'basic' is not allowed; mixquant, ptilmpq, plan"),
        (lambda: conf(qem=2, loss=float("nan")), "tolerable_loss"),
    ],
)  # fmt: skip
def test_what_is_not_allowed(made: Callable[[], Any], said: str) -> None:
    model = nets.made(nets.SmallNet)
    before = copy.deepcopy(model)
    with pytest.raises(MPQError, match=said):
        classic.fit(model, made(), calib_dataloader=DataLoader(BATCHES, 4))
    assert same(model, before)


def other_plan() -> Plan:
    return Uniform(bits=4)(measure(nets.Tied(), bits=(4,)))


def test_plans_of_other_models_and_with_activations() -> None:
    model = nets.made(nets.SmallNet)
    with pytest.raises(MismatchError, match="made for another model"):
        classic.apply(model, other_plan())
    plan = Uniform(bits=4)(measure(model, bits=(4,))).with_activation_bits(8)
    with pytest.raises(SettingError, match="activations"):
        classic.apply(model, plan)
    for ask in (classic.plan_of, classic.tuning_of):
        with pytest.raises(SettingError, match="was not"):
            ask(model)


@pytest.mark.parametrize("fold_bn", [False, True])
def test_verify_sees_another_bias(fold_bn: bool) -> None:
    model = nets.made(nets.SmallNet)
    changed: Any = classic.apply(model, Uniform(bits=4)(measure(model, PER_CHANNEL, (4,), fold_bn=fold_bn)))
    classic.verify(changed, classic.plan_of(changed), model, batch=IMAGES)
    with torch.no_grad():
        changed.model.fc.bias += 1
    with pytest.raises(VerifyError, match=r"'fc.bias' is not the model's own"):
        classic.verify(changed, classic.plan_of(changed), model)


def test_verify_sees_what_was_put_into_a_folded_model() -> None:
    model = nets.made(nets.SmallNet)
    plan = Uniform(bits=4)(measure(model, PER_CHANNEL, (4,), fold_bn=True))
    for name, module in (("bn1", nn.BatchNorm2d(8, affine=False, track_running_stats=False)), ("e", nn.LayerNorm(2))):
        q_model: Any = classic.apply(model, plan)
        setattr(q_model.model, name, module)
        with pytest.raises(VerifyError, match=f"'{name}' is a "):
            classic.verify(q_model, plan, model)


def test_under_inference_mode() -> None:
    model = nets.made(nets.SmallNet)
    with torch.inference_mode():
        q_model = classic.fit(model, conf(qem=2), eval_func=lambda given: 1.0)
    classic.verify(q_model, classic.plan_of(q_model), model, batch=IMAGES)


@pytest.mark.parametrize("plans", [None, "plan", [None]])
def test_plans_to_tune_over_are_a_list_of_plans(plans: Any) -> None:
    with pytest.raises(SettingError, match="a list of Plans"):
        classic.tune(nets.made(nets.SmallNet), plans, by_levels)
    with pytest.raises(SettingError, match="evaluate: is a NoneType, no function"):
        classic.tune(nets.made(nets.SmallNet), [other_plan()], None)


@pytest.mark.parametrize("rounding", [None, "nearest", "compensated"])
def test_trials_on_inputs_are_what_apply_makes_of_them(rounding: Any) -> None:
    model, batches = nets.made(nets.SmallNet), list(torch.cat([IMAGES, IMAGES.flip(0) / 2]).split(4))
    table = measure(model, PER_CHANNEL, (2, 3))
    plans = [Uniform(bits=bits)(table) for bits in (2, 3)]
    tried: list[nn.Module] = []

    def score(given: nn.Module) -> float:
        tried.append(given)
        return 100.0 if len(tried) in (1, 3) else 1.0

    run = classic.tune(model, plans, score, calibrate=batches, rounding=rounding)
    assert [trial.met for trial in run.trials] == [False, True]
    for found, plan in zip(tried[1:3], plans, strict=True):
        assert same(found, simulated(model, plan, calibrate=batches, rounding=rounding))
    with pytest.raises(SettingError, match="rounding: 'compensated' needs calibration inputs"):
        classic.tune(model, plans, score, rounding="compensated")


def test_a_bare_layer() -> None:
    model = nn.Linear(8, 8).eval()
    plan = Uniform(bits=4)(measure(model, PER_CHANNEL, (4,)))
    classic.verify(classic.apply(model, plan), plan, model, batch=torch.randn(3, 8))
