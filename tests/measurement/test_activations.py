"""What is measured of layers' inputs, against hooks by hand and whole runs; what is refused, by name."""

import pickle
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpq_plugins import (
    Activations,
    Affine,
    InputRange,
    InputStats,
    LayerTable,
    Store,
    measure,
    measure_activations,
    measure_types,
    sensitivity,
    with_input_ranges,
)
from mpq_plugins.errors import MismatchError, SettingError, WorkerError
from mpq_plugins.measurement.replay import Replay
from mpq_plugins.models.folding import fold_batch_norm
from mpq_plugins.models.input_ranges import quantized_input
from mpq_plugins.plans.table import with_macs
from tests.helpers.nets import conv_net, tied_net
from tests.helpers.tables import contents

pytestmark = pytest.mark.usefixtures("one_thread")

BITS = (2, 4, 8, 16)
ALL = ("output_mse", "kl", "distance")
MINMAX = Activations(8, range="minmax")
BATCHES = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(2)).add(0.3).split(4)
ROWS = (torch.randn(12, 8, generator=torch.Generator().manual_seed(3)) + 0.5).split(5)


class Aside(nn.Module):
    """Its second layer reads what the first one left in an attribute, which no replaying sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.left = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.left = torch.tanh(self.first(x))
        logits: Tensor = self.third(self.second(self.left) + self.left)
        return logits.detach() if not torch.is_grad_enabled() else logits


def aside() -> nn.Module:
    torch.manual_seed(0)
    return Aside().eval()


def chain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).eval()


def inputs_of(table: LayerTable) -> dict[str, InputStats]:
    return {layer.name: layer.inputs for layer in table.layers if layer.inputs is not None}


# ---- against hooks by hand


def by_hand(x: Tensor, low: float, high: float, bits: int, symmetric: bool) -> Tensor:
    """x' at the levels that reach from low to high, and 0, in float32 as models compute."""
    given = x.numpy()
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        scale, zero = np.float32(max(-low, high)) / np.float32(2 ** (bits - 1) - 1), np.float32(2 ** (bits - 1))
    else:
        scale = np.float32(np.float32(high) - np.float32(low)) / np.float32(2**bits - 1)
        zero = np.round(np.float32(-low) / scale)
    codes = np.clip(np.round(given / scale) + zero, 0, 2**bits - 1)
    return torch.from_numpy((codes - zero) * scale)


def seen_by(model: nn.Module, layer: str, batches: Any, change: Callable[[Tensor], Tensor]) -> tuple[list[Any], ...]:
    """The layer's inputs, its outputs and the model's, with each input changed."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        inputs.append(args[0].clone())
        return (change(args[0]),)

    module = model.get_submodule(layer)
    handles = [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(lambda _, __, output: outputs.append(output)),
    ]
    with torch.no_grad():
        logits = [model(batch) for batch in batches]
    for handle in handles:
        handle.remove()
    return inputs, outputs, logits


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dynamic", [None, "per_tensor"])
@pytest.mark.parametrize("name", ["convolutions", "folded", "aside"])
def test_every_number_is_that_of_one_input_quantized_by_hand(name: str, dynamic: Any, symmetric: bool) -> None:
    model, batches = (aside(), ROWS) if name == "aside" else (conv_net(), BATCHES)
    table = measure(model, Affine(granularity="per_channel"), (4,), fold_bn=name == "folded")
    activations = Activations(8, symmetric, dynamic, range="minmax")
    found = inputs_of(measure_activations(model, table, batches, BITS, activations=activations, sensitivities=ALL))
    run = fold_batch_norm(model) if name == "folded" else model
    samples = sum(len(batch) for batch in batches)
    for layer in table.layers:
        exact, exact_out, logits = seen_by(run, layer.name, batches, lambda x: x)
        ends = float(min(x.min() for x in exact)), float(max(x.max() for x in exact))
        own = found[layer.name]
        assert own.numel == round(sum(x.numel() for x in exact) / samples)
        for position, b in enumerate(BITS):

            def change(x: Tensor, b: int = b, ends: Any = ends) -> Tensor:
                low, high = ends if dynamic is None else (float(x.min()), float(x.max()))
                return by_hand(x, low, high, b, symmetric)

            _, rough_out, moved = seen_by(run, layer.name, batches, change)
            lost = torch.cat([(x - change(x)).double().flatten() for x in exact])
            sizes = torch.cat([x.double().abs().flatten() for x in exact])
            relative = torch.where(sizes > 0, lost.abs() / sizes, 0).mean()
            pairs = list(zip(exact_out, rough_out, strict=True))
            output = sum(float((a.double() - c.double()).square().sum()) for a, c in pairs) / samples
            p, q = torch.cat(logits).double(), torch.cat(moved).double()
            kl = (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1).mean()
            distance = 1 - torch.cosine_similarity(p, q, dim=1).mean()
            for value, oracle in (
                (own.errors["mse"], lost.square().mean()), (own.errors["relative"], relative),
                (own.sensitivities["output_mse"], output), (own.sensitivities["kl"], kl),
                (own.sensitivities["distance"], distance),
            ):  # fmt: skip
                np.testing.assert_allclose(value[position], float(oracle), rtol=2e-3, atol=1e-9)


def test_a_token_has_the_range_of_its_own() -> None:
    model = chain()
    rows = torch.stack([torch.linspace(0.1, 1, 8), 100 * torch.linspace(0.1, 1, 8)])
    table = measure(model, bits=(4,))
    errors = {
        dynamic: inputs_of(
            measure_activations(model, table, [rows], (4,), activations=Activations(4, dynamic=dynamic))
        )["0"].errors["relative"][0]
        for dynamic in ("per_tensor", "per_token")
    }  # fmt: skip
    assert errors["per_tensor"] > 0.4  # the small row vanishes
    one = by_hand(rows[:1], 0.1, 1, 4, symmetric=False)
    assert errors["per_token"] == pytest.approx(float(((one - rows[0]).abs() / rows[0]).mean()), rel=1e-5)


def test_a_range_of_least_error_loses_no_more_than_the_extremes() -> None:
    model, batches = conv_net(), list(BATCHES)
    batches[0][0, 0, 0, 0] = 20.0  # an outlier
    table = measure(model, bits=(4,))
    mse, minmax = (
        inputs_of(measure_activations(model, table, batches, (2, 4, 8), activations=given))
        for given in (Activations(8), MINMAX)
    )
    for name in mse:
        assert (mse[name].errors["mse"] <= minmax[name].errors["mse"] * (1 + 1e-6)).all()
    assert mse["conv1"].errors["mse"][0] < 0.7 * minmax["conv1"].errors["mse"][0]


def test_a_tied_weight_has_the_inputs_of_all_its_calls_and_an_embedding_none() -> None:
    model, tokens = tied_net(), torch.randint(0, 20, (6, 5), generator=torch.Generator().manual_seed(4))
    table = measure(model, bits=(4,))
    found = measure_activations(model, table, [tokens], (8,), activations=MINMAX)
    assert [layer.inputs is None for layer in found.layers] == [True, False]
    with torch.no_grad():
        embedded = model.embed(tokens)
        first = model.block(embedded)
    own = inputs_of(found)["block"]
    assert own.numel == 2 * 5 * 8
    both = torch.cat([embedded, first])
    lost = both - by_hand(both, float(both.min()), float(both.max()), 8, symmetric=False)
    assert own.errors["mse"][0] == pytest.approx(float(lost.double().square().mean()), rel=1e-3)


def test_levels_of_16_bits_are_told_apart_in_half_precision() -> None:
    x = torch.linspace(-1, 3, 1000).half()
    made = quantized_input(x, InputRange(16, 4 / 65535, 16384))
    assert made.dtype == torch.float16
    assert float((made.double() - x.double()).abs().max()) < 0.001  # worked out in half, 65,535 would be infinite


@pytest.mark.parametrize("dynamic", [None, "per_tensor", "per_token"])
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_what_is_measured_is_what_a_model_with_ranges_computes(dynamic: Any, bits: int) -> None:
    own = InputRange(bits, 0.0123, 2) if dynamic is None else InputRange(bits, dynamic=dynamic, symmetric=True)
    model = with_input_ranges(nn.Sequential(nn.Linear(8, 4)), {"0": own})
    quantizer = model.get_submodule("0.input_quantizer")
    assert torch.equal(quantized_input(ROWS[0], own), quantizer(ROWS[0]))


# ---- which tensors are the same


class Branch(nn.Module):
    """A stem, a residual block whose shortcut is a convolution, a head; (N, 3, 4, 4) -> (N, 5)."""

    def __init__(self, changed: bool = False) -> None:
        super().__init__()
        self.stem, self.conv1 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.conv2, self.short, self.fc = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)
        self.changed = changed

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        main = self.conv2(torch.relu(self.conv1(x)))
        if self.changed:
            x.add_(1)
        logits: Tensor = self.fc(torch.relu(main + self.short(x)).mean(dim=(2, 3)))
        return logits


@pytest.mark.parametrize(("changed", "short"), [(False, "conv1"), (True, "short")])
def test_layers_that_read_one_tensor_are_told_unless_it_changed_in_between(changed: bool, short: str) -> None:
    torch.manual_seed(0)
    model = Branch(changed).eval()
    images = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    found = measure_activations(model, measure(model, bits=(4,)), images.split(2), (8,))
    tensors = {name: own.tensor for name, own in inputs_of(found).items()}
    assert tensors == {"stem": "stem", "conv1": "conv1", "conv2": "conv2", "short": short, "fc": "fc"}
    kept = (("conv1", "conv2"),) if not changed else (("conv1",), ("conv2",), ("short",))
    assert found.live == (("stem",), *kept, ("fc",))


# ---- the store, executors, what else a table holds


def interrupted(after: int) -> Callable[[str, int, int], None]:
    def said(_: str, done: int, total: int) -> None:
        assert done <= total
        if done == after:
            raise KeyboardInterrupt

    return said


def test_an_interrupted_measurement_goes_on_to_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, table = conv_net(), measure(conv_net(), bits=(4,))
    runs: list[int] = []
    again = Replay.again
    monkeypatch.setattr(Replay, "again", lambda *given: runs.append(1) or again(*given))  # type: ignore[func-returns-value]
    whole = measure_activations(model, table, BATCHES, (3, 8), sensitivities=("kl", "distance"))
    needed = len(runs)
    place = tmp_path / "table.partial"
    with pytest.raises(KeyboardInterrupt):
        measure_activations(
            model, table, BATCHES, (3, 8), sensitivities=("kl", "distance"), store=place, progress=interrupted(4 + 11)
        )
    with Store(place) as store:
        assert len(store) == 12
        del runs[:]
        rest = measure_activations(model, table, BATCHES, (3, 8), sensitivities=("kl", "distance"), store=store)
    assert contents(rest) == contents(whole)
    assert needed / 4 < len(runs) < needed / 2  # 4 of 16 rows
    assert not place.exists()


@pytest.mark.parametrize("other", ["bits", "activations", "batches", "model"])
def test_another_jobs_store_is_refused(tmp_path: Path, other: str) -> None:
    table, place = measure(conv_net(), bits=(4,)), tmp_path / "table.partial"
    with pytest.raises(KeyboardInterrupt):
        measure_activations(
            conv_net(), table, BATCHES, (3,), sensitivities=("kl",), store=place, progress=interrupted(6)
        )
    model, batches = conv_net(), list(BATCHES)
    if other == "model":
        torch.nn.init.ones_(model.fc.bias)
    if other == "batches":
        batches = batches[:1]
    with pytest.raises(SettingError, match=f"differs in {other}"):
        measure_activations(
            model, table, batches, (4,) if other == "bits" else (3,), sensitivities=("kl",), store=place,
            activations=MINMAX if other == "activations" else Activations(8),
        )  # fmt: skip


def _sent(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301  # our own


class Elsewhere(Executor):
    """Does at once what it is given, as another process would: all that it gets and gives is pickled."""

    def __init__(self) -> None:
        self.calls = 0

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **_: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.calls += 1
        try:
            own, given = _sent((function, arguments))
            future.set_result(_sent(own(*given)))
        except Exception as error:  # noqa: BLE001  # as executors do
            future.set_exception(error)
        return future


def test_an_executor_measures_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpq_plugins.measurement.alone.LAYERS_A_UNIT", 3)
    model, table = conv_net(), measure(conv_net(), bits=(4,))
    options: dict[str, Any] = {"bits": (3, 8), "sensitivities": ALL}
    here = contents(measure_activations(model, table, BATCHES, **options))
    with ThreadPoolExecutor(2) as pool:
        assert contents(measure_activations(model, table, BATCHES, executor=pool, **options)) == here
    elsewhere = Elsewhere()
    assert contents(measure_activations(model, table, BATCHES, executor=elsewhere, **options)) == here
    assert elsewhere.calls == 2 * 2 * 2  # kinds, batches, units of 3 and of 1 layers


def no_memory(*_: Any) -> None:
    raise MemoryError("no room")


def test_a_worker_that_fails_is_said_with_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpq_plugins.measurement.alone.unit_rows", no_memory)
    model = chain()
    said = r"measuring the kl of inputs of '0' failed on a worker \(MemoryError: no room\)"
    with pytest.raises(WorkerError, match=said):
        measure_activations(
            model, measure(model, bits=(4,)), ROWS, (8,), sensitivities=("kl",), executor=Elsewhere(),
        )  # fmt: skip


def test_inputs_stay_where_the_table_is_filled_further_and_all_else_stays_where_they_are_filled_in() -> None:
    model = chain()
    table = sensitivity(model, with_macs(measure(model, bits=(4,)), {"0": 3}), "output_mse", ROWS)
    filled = measure_activations(model, table, ROWS, (8,))
    bare = replace(
        filled, layers=tuple(replace(layer, inputs=None) for layer in filled.layers), activations=None, input_bits=(),
        live=(),
    )  # fmt: skip
    assert contents(bare) == contents(table)
    further = sensitivity(model, with_macs(filled, {"0": 4}), "kl", ROWS)
    assert contents(list(inputs_of(further).values())) == contents(list(inputs_of(filled).values()))
    assert (further.activations, further.input_bits, further.live) == (Activations(8), (8,), filled.live)


def test_a_models_own_output_function_is_what_is_compared() -> None:
    model, table = chain(), measure(chain(), bits=(4,))

    def halves(net: nn.Module, batch: Any) -> Tensor:
        return net(batch)[:, :2]  # type: ignore[no-any-return]

    whole = inputs_of(measure_activations(model, table, ROWS, (3,), sensitivities=("distance",)))
    half = inputs_of(measure_activations(model, table, ROWS, (3,), sensitivities=("distance",), output=halves))
    assert whole["0"].sensitivities["distance"][0] != half["0"].sensitivities["distance"][0]


def test_the_model_is_not_changed() -> None:
    model = conv_net().train()
    before = pickle.dumps(model.state_dict())
    measure_activations(model, measure(model, bits=(4,), fold_bn=False), BATCHES, (3,), sensitivities=ALL)
    assert pickle.dumps(model.state_dict()) == before
    assert model.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# ---- what is refused


class Skips(nn.Module):
    """One of its layers is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(8, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.used(x)
        return logits


def with_value(value: float) -> list[Tensor]:
    batches = [batch.clone() for batch in ROWS]
    batches[1][2, 3] = value
    return batches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": (1, 8)}, "bits: inputs of 1 bit are not allowed"),
        ({"bits": (8, 17)}, "bits: 17 is not allowed; 2 to 16"),
        ({"bits": ()}, r"bits: \(\) is not allowed"),
        ({"bits": 8}, "bits: 8 is not allowed; a list"),
        ({"bits": (8.0,)}, "bits: 8.0 is not allowed"),
        ({"sensitivities": ("fisher",)}, "sensitivities: 'fisher' is not known of inputs; output_mse, kl, distance"),
        ({"activations": 8}, r"activations: 8 is not allowed; a value such as Activations\(8\)"),
        ({"batches": []}, "batches: none given"),
        ({"batches": [torch.zeros(4, 8)]}, "layer '0': its inputs are all zero"),
        ({"batches": with_value(float("inf"))}, "layer '0': its input holds NaN or infinity in batch 1"),
        ({"batches": with_value(float("nan"))}, "layer '0': its input holds NaN or infinity in batch 1"),
        ({"executor": "dask"}, "executor: str is no concurrent.futures.Executor"),
    ],
)
def test_bad_input_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    model = chain()
    given = {"batches": ROWS, "sensitivities": ("kl",), **options}
    with pytest.raises(SettingError, match=message):
        measure_activations(model, measure(model, bits=(4,)), **given)


@pytest.mark.parametrize("how", [Activations(8), MINMAX, Activations(8, dynamic="per_tensor")], ids=str)
def test_a_constant_is_a_level_of_its_range(how: Activations) -> None:
    model = chain()
    batches = [torch.full((4, 8), 0.25)]
    found = measure_activations(model, measure(model, bits=(4,), skip=["2", "4"]), batches, (2,), activations=how)
    assert inputs_of(found)["0"].errors["mse"][0] == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("how", ["minmax", "percentile", "mse", "kl", "moving_average"])
def test_every_way_to_find_a_range_is_measured(how: Any) -> None:
    model, table = chain(), measure(chain(), bits=(4,))
    found = measure_activations(model, table, ROWS, (2, 8), activations=Activations(8, range=how))
    assert found.activations == Activations(8, range=how)
    for own in inputs_of(found).values():
        assert own.errors["mse"][0] > own.errors["mse"][1] > 0


def test_a_layer_that_no_batch_reaches_is_named() -> None:
    model = Skips().eval()
    with pytest.raises(SettingError, match="layer 'idle': no batch reaches it"):
        measure_activations(model, measure(model, bits=(4,)), ROWS, (8,))
    found = measure_activations(model, measure(model, bits=(4,), skip=["idle"]), ROWS, (8,))
    assert list(inputs_of(found)) == ["used"]


def test_an_input_that_the_output_does_not_depend_on_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)).eval()
    nn.init.zeros_(model.get_parameter("1.weight"))
    with pytest.raises(SettingError, match="layer '0': no batch reaches it, or the output does not depend on it"):
        measure_activations(model, measure(model, bits=(4,), skip=["1"]), ROWS, (4, 8), sensitivities=("kl",))


def test_other_models_tables_of_types_and_models_with_ranges_are_refused() -> None:
    model = chain()
    table = measure(model, bits=(4,))
    other = chain()
    nn.init.ones_(other.get_parameter("0.weight"))
    with pytest.raises(MismatchError, match="other weights"):
        measure_activations(other, table, ROWS, (8,))
    with pytest.raises(SettingError, match="quantizes the inputs of '0'"):
        measure_activations(with_input_ranges(model, {"0": InputRange(8, 0.1, 128)}), table, ROWS, (8,))
    with pytest.raises(SettingError, match="table: a TypeTable has no widths"):
        measure_activations(model, measure_types(model, ("int8",)), ROWS, (8,))  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="per_token belongs to linear layers, and 'conv1', 'conv2', 'up' are none"):
        measure_activations(
            conv_net(), measure(conv_net(), bits=(4,)), BATCHES, (8,), activations=Activations(8, dynamic="per_token")
        )


class Codes(nn.Linear):
    """A layer that takes numbers of rows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.eye(8)[x])


def test_an_input_without_floating_values_is_refused_by_name() -> None:
    model = nn.Sequential(Codes(8, 4)).eval()
    with pytest.raises(SettingError, match="layer '0': its input is int64"):
        measure_activations(model, measure(model, bits=(4,)), [torch.arange(8)[:, None]], (8,))


def test_progress_ends_at_its_total() -> None:
    said: list[tuple[int, int]] = []
    model = chain()
    measure_activations(
        model, measure(model, bits=(4,)), ROWS, (8,), sensitivities=ALL,
        progress=lambda _, done, total: said.append((done, total)),
    )  # fmt: skip
    total = len(ROWS) * (2 + 2 * 3)
    assert said == [(done, total) for done in range(total + 1)]
