"""Two nets side by side: who arrives where in which order, with which values, and what goes on from there."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq_plugins.errors import SettingError
from mpq_plugins.models.copying import duplicate
from mpq_plugins.reconstruction.stations import find_stations
from mpq_plugins.reconstruction.walk import Arrival, Station, Step, Walk
from tests.helpers.says import naming

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """A layer and its norm around a shortcut, a second layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc1, self.bn1 = nn.Linear(4, 5), nn.Linear(5, 5), nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.bn1(self.fc1(x)) + x
        return self.head(self.head(x))  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Any:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 4, generator=generator) for n in (3, 2, 6)]


def pair() -> tuple[Any, Any]:
    torch.manual_seed(0)
    exact = Net().eval().requires_grad_(False)
    return exact, duplicate(exact)


def walk_of(exact: Any, rough: Any, biased: Sequence[str] = ("stem",), norms: Sequence[str] = ("bn1",)) -> Walk:
    layers = ("stem", "fc1", "head")
    stations = find_stations(exact, [*layers, *norms], batches()[0])
    return Walk(exact, rough, stations, {name: (name,) for name in layers}, frozenset(biased), frozenset(norms))


STEM, STEM_BIAS = Station("stem", Step.ROUND), Station("stem", Step.BIAS)
FC1, NORM, HEAD = Station("fc1", Step.ROUND), Station("bn1", Step.NORM), Station("head", Step.ROUND)


def outputs_at(net: Any, name: str, given: Sequence[Tensor], *, of_input: bool = False) -> list[Tensor]:
    """What a module gets or gives in an ordinary run, at its first call."""
    values: list[list[Tensor]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        values[-1].append((args[0] if of_input else output).clone())

    handle = net.get_submodule(name).register_forward_hook(hook)
    for batch in given:
        values.append([])
        net(batch)
    handle.remove()
    return [calls[0] for calls in values]


def test_all_batches_arrive_at_each_station_before_the_next_one() -> None:
    exact, rough = pair()
    seen: list[tuple[Station, int]] = []
    walk = walk_of(exact, rough)
    walk.run(batches(), lambda station, arrivals: seen.append((station, len(arrivals))))
    assert seen == [(station, 3) for station in (STEM, STEM_BIAS, FC1, NORM, HEAD)]
    assert walk.done == {STEM, STEM_BIAS, FC1, NORM, HEAD}


def test_arrivals_are_what_ordinary_runs_bring() -> None:
    exact, rough = pair()
    with torch.no_grad():
        rough.stem.weight.mul_(1.5)
    seen: dict[Station, list[Arrival]] = {}
    walk_of(exact, rough).run(
        batches(), lambda at, arrivals: seen.update({at: [Arrival(a.rough.clone(), a.exact.clone(), a.shortcut)
                                                          for a in arrivals]})
    )  # fmt: skip
    for station, rough_input, exact_input in ((STEM, True, False), (FC1, True, False), (HEAD, True, False),
                                              (STEM_BIAS, False, False), (NORM, True, True)):  # fmt: skip
        expected = zip(
            outputs_at(rough, station.name, batches(), of_input=rough_input),
            outputs_at(exact, station.name, batches(), of_input=exact_input), strict=True,
        )  # fmt: skip
        for arrival, (q, f) in zip(seen[station], expected, strict=True):
            assert arrival.rough.equal(q)
            assert arrival.exact.equal(f)


def test_what_is_added_behind_a_layer_comes_with_it() -> None:
    exact, rough = pair()
    with torch.no_grad():
        rough.stem.weight.mul_(1.5)
    shortcuts: dict[Station, list[Any]] = {}
    walk_of(exact, rough).run(batches(), lambda at, arrivals: shortcuts.update({at: [a.shortcut for a in arrivals]}))
    given = [outputs_at(net, "fc1", batches(), of_input=True) for net in (exact, rough)]
    for found, f, q in zip(shortcuts[FC1], *given, strict=True):
        assert found[0].equal(f)
        assert found[1].equal(q)
    assert all(found is None for at, of_batches in shortcuts.items() if at != FC1 for found in of_batches)


def test_a_weight_that_is_changed_at_its_station_counts_from_there_on() -> None:
    exact, rough = pair()
    arrived: list[Tensor] = []

    def handle(at: Station, arrivals: Sequence[Arrival]) -> None:
        if at == FC1:
            rough.fc1.weight.mul_(-2)
        if at == NORM:
            arrived.extend(arrival.rough.clone() for arrival in arrivals)

    walk_of(exact, rough).run(batches(), handle)
    for value, expected in zip(arrived, outputs_at(rough, "fc1", batches()), strict=True):
        assert value.equal(expected)


def test_the_answer_moves_the_quantized_nets_outputs_and_not_the_float_nets() -> None:
    exact, rough = pair()
    arrived: list[Arrival] = []

    def handle(at: Station, arrivals: Sequence[Arrival]) -> Any:
        if at == FC1:
            arrived.extend(arrivals)
        return (lambda output: output + 100) if at == STEM_BIAS else None

    walk_of(exact, rough).run(batches(), handle)
    inputs, exact_outputs = outputs_at(rough, "stem", batches()), outputs_at(exact, "fc1", batches())
    for arrival, before, output in zip(arrived, inputs, exact_outputs, strict=True):
        assert arrival.rough.equal(F.relu(before + 100))
        assert arrival.exact.equal(output)


def test_finished_stations_are_passed() -> None:
    exact, rough = pair()
    walk = walk_of(exact, rough)
    walk.done |= {STEM, FC1, NORM}
    seen: list[Station] = []
    walk.run(batches(), lambda station, arrivals: seen.append(station))
    assert seen == [STEM_BIAS, HEAD]


def test_batches_that_take_another_way_arrive_where_they_come_by() -> None:
    class Expert(nn.Module):
        """A batch of three takes the one way, others take the other."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.one(x) if len(x) == 3 else self.other(x)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    exact = Expert().eval().requires_grad_(False)
    rough = duplicate(exact)
    names = ("stem", "one", "other")
    stations = find_stations(exact, names, batches()[0])
    seen: list[tuple[str, int]] = []
    walk = Walk(exact, rough, stations, {name: (name,) for name in names}, frozenset(), frozenset())
    walk.run(batches(), lambda at, arrivals: seen.append((at.name, len(arrivals))))
    assert seen == [("stem", 3), ("one", 1), ("other", 2)]


def test_hooks_and_threads_are_gone_after_a_run_and_after_an_error() -> None:
    exact, rough = pair()

    def fail(at: Station, arrivals: Sequence[Arrival]) -> None:
        if at == FC1:
            raise KeyboardInterrupt

    walk_of(exact, rough).run(batches(), lambda at, arrivals: None)
    with pytest.raises(KeyboardInterrupt):
        walk_of(exact, rough).run(batches(), fail)
    with pytest.raises(SettingError, match=naming("batches", "does not run", "(3, 7)")):
        walk_of(exact, rough).run([*batches(), torch.randn(3, 7)], lambda at, arrivals: None)
    for net in (exact, rough):
        for module in net.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


def test_an_error_in_the_middle_of_a_forward_comes_out() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x)
            if len(x) == 2:
                raise RuntimeError("two are too few")
            return y

    exact = Fails().eval().requires_grad_(False)
    rough = duplicate(exact)
    stations = find_stations(exact, ["fc"], batches()[0])
    walk = Walk(exact, rough, stations, {"fc": ("fc",)}, frozenset(), frozenset())
    with pytest.raises(SettingError, match=naming("batches", "two are too few")):
        walk.run(batches(), lambda at, arrivals: None)


def test_a_layer_that_gives_no_tensor_is_named() -> None:
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.pair(x)[0]

    exact = Holder().eval().requires_grad_(False)
    rough = duplicate(exact)
    stations = find_stations(exact, ["pair"], batches()[0])
    walk = Walk(exact, rough, stations, {"pair": ("pair",)}, frozenset(), frozenset())
    with pytest.raises(SettingError, match=naming("'pair'", "tuple", "skip it")):
        walk.run(batches(), lambda at, arrivals: None)


def test_a_run_beside_the_walk_stops_nowhere() -> None:
    exact, rough = pair()
    own: list[Tensor] = []
    expected = exact(batches()[0])
    walk_of(exact, rough).run(batches(), lambda at, arrivals: own.append(exact(batches()[0])))
    assert len(own) == 5
    assert all(output.equal(expected) for output in own)


def test_batches_are_not_changed() -> None:
    class InPlace(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(3))

    torch.manual_seed(0)
    exact = InPlace().eval().requires_grad_(False)
    given = batches()
    walk_of(exact, duplicate(exact)).run(given, lambda at, arrivals: None)
    assert all(one.equal(other) for one, other in zip(given, batches(), strict=True))
