"""Every file of ours: damage is noticed, whatever bytes there are only our errors come of them, and no file of a few
bytes takes much memory."""

import json
import os
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mpq_plugins import Affine, LatencyTable, LayerTable, MixQuant, Plan, Store, compress, measure
from mpq_plugins.common import store_file
from mpq_plugins.common.checksum import unsealed
from mpq_plugins.compression.container import Container
from mpq_plugins.errors import FormatError, MPQError, SettingError
from tests.helpers.nets import tied_net
from tests.helpers.plans import linear, plan_of, plans
from tests.helpers.tables import contents

pytestmark = pytest.mark.slow

UNITS = {"a": b"0.75", "b": b"-" * 300, "c": b""}


@dataclass(frozen=True)
class Kind:
    """A kind of file: how one is written, and what is read from it. whole: whether a damaged one gives nothing at all,
    rather than what is intact of it. every: whether each of its bytes can be tried in a test's time."""

    write: Callable[[Path], object]
    read: Callable[[Path], Any]
    whole: bool = True
    every: bool = True


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def write_container(path: Path) -> None:
    net = small_net()
    compress(net, MixQuant(qem=3)(measure(net)), path.with_suffix(".mpq")).path.rename(path)


def read_container(path: Path) -> Any:
    container = Container.open(path)
    return container.plan.to_json(), {name: own.numpy().tobytes() for name, own in container.tensors().items()}


def write_store(path: Path) -> None:
    with suppress(KeyboardInterrupt), Store(path) as store:
        finished = store.job("work", {"model": "x"})
        for name, data in UNITS.items():
            finished.add(name, data)
        raise KeyboardInterrupt  # or it would go


def read_store(path: Path) -> dict[str, bytes]:
    found = {}
    with suppress(KeyboardInterrupt), Store(path) as store:
        finished = store.job("work", {"model": "x"})
        found = {name: finished.take(name) for name in finished}
        raise KeyboardInterrupt
    return found


KINDS = {
    "plan": Kind(lambda path: MixQuant(qem=3)(measure(tied_net())).save(path), lambda path: Plan.load(path).to_json()),
    "table": Kind(
        lambda path: measure(small_net(), per_channel=True).save(path), lambda path: contents(LayerTable.load(path))
    ),
    "container": Kind(write_container, read_container),
    "store": Kind(write_store, read_store, whole=False, every=False),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture(scope="module", autouse=True)
def small_pages() -> Iterator[None]:
    """So that a store is small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_file, "PAGE", 512)
        patch.setattr(store_file, "FLUSHED", ("OFF", "OFF"))
        yield


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, Any]]:
    """Of each kind a file's bytes, and what is read from them."""
    found = {}
    for name, kind in KINDS.items():
        path = tmp_path_factory.mktemp("whole") / name
        kind.write(path)
        found[name] = (path.read_bytes(), kind.read(path))
    return found


def read_as(kind: Kind, folder: Path, data: bytes) -> Any:
    """What is read of these bytes; an MPQError where that is refused."""
    path = folder / "file"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return kind.read(path)
        except MPQError as error:
            return error


def check(kind: Kind, found: Any, expected: Any) -> None:
    if isinstance(found, MPQError):
        assert "\n" not in str(found)
        return
    if found == expected:
        return
    assert not kind.whole, "another result than was written"
    assert all(expected[key] == value for key, value in found.items()), "a row that nobody wrote"


@pytest.mark.slow
@kinds
def test_every_flipped_bit_is_noticed(kind: Kind, samples: dict[str, Any], tmp_path: Path) -> None:
    data, expected = samples[next(name for name, own in KINDS.items() if own is kind)]
    # A store is whole pages of mostly nothing, each of which is read in milliseconds.
    positions = range(len(data)) if kind.every else range(0, len(data), 7)
    for position in positions:
        # Two bits of eight, other ones in the next byte; five is the bit by which letters are small or large.
        for bit in {position % 8, 5} if kind.every else {position % 8}:
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            check(kind, read_as(kind, tmp_path, bytes(flipped)), expected)


@kinds
def test_every_shorter_file_is_noticed(kind: Kind, samples: dict[str, Any], tmp_path: Path) -> None:
    data, expected = samples[next(name for name, own in KINDS.items() if own is kind)]
    for length in {*range(0, len(data), 3 if kind.every else 7), len(data) - 1}:
        check(kind, read_as(kind, tmp_path, data[:length]), expected)


@pytest.mark.slow
@kinds
@settings(max_examples=120, deadline=None)
@given(st.data())
def test_whatever_bytes_there_are_only_our_errors_come_of_them(
    kind: Kind, samples: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    written, expected = samples[next(name for name, own in KINDS.items() if own is kind)]
    folder = tmp_path_factory.mktemp("bytes")
    begin = data.draw(st.integers(0, len(written)))
    end = data.draw(st.integers(begin, len(written)))
    put = data.draw(st.binary(max_size=40))
    check(kind, read_as(kind, folder, written[:begin] + put + written[end:]), expected)
    read_as(kind, folder, put)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 40) | st.floats() | st.text(max_size=4)
    | st.sampled_from([10**400, -(10**20), "٣", "0-3", "affine", "fc", "\ud800", 2.0, "2"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document, as the keys that lead there."""
    if not isinstance(document, dict | list):
        return [path]
    inner = document.items() if isinstance(document, dict) else enumerate(document)
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of the document with another value in one place, or without it (...)."""
    if not path:
        return None if value is ... else value
    copied = dict(document) if isinstance(document, dict) else list(document)
    if len(path) == 1 and value is ...:
        del copied[path[0]]
    else:
        copied[path[0]] = changed(copied[path[0]], path[1:], value)
    return copied


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(plans, st.data())
def test_a_changed_plan_is_refused_or_is_a_plan(made: Plan, data: st.DataObject) -> None:
    document = unsealed(json.loads(made.to_json()))
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(places(document)[1:] or [()]))
        document = changed(document, place, data.draw(json_values | st.just(...)))
    try:
        loaded = Plan.model_validate_json(json.dumps(document))
    except FormatError:
        return
    assert Plan.model_validate_json(loaded.to_json()) == loaded
    assert loaded.size().total_bytes >= 0
    assert loaded.diff(made) is not None


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_changed_latency_table_is_refused_or_is_one(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    document = {"fc": {"2": 0.5, "8": 1}, "conv": {"32": 0.0}}
    place = data.draw(st.sampled_from(places(document)))
    path = tmp_path_factory.mktemp("latency") / "latency.json"
    path.write_text(json.dumps(changed(document, place, data.draw(json_values))))
    try:
        table = LatencyTable.of(path)
    except (FormatError, SettingError):
        return
    assert all(type(cost) is float and 0 <= cost < 1e301 for _, own in table.entries for _, cost in own)
    assert all(bits in (*range(1, 9), 16, 32) for _, own in table.entries for bits, _ in own)


def peak(work: Callable[[], object]) -> int:
    """Most bytes that were in use at once."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


MEGABYTE = 1 << 20


def test_parts_of_millions_of_channels_take_no_memory() -> None:
    document = unsealed(json.loads(plan_of(linear("fc", 4, 2, Affine(), {3: (0, 1), 4: (2, 3)})).to_json()))
    document["layers"][0]["parts"] = [{"bits": 3, "channels": "0-16777215"}] * 60

    def refused() -> None:
        with pytest.raises(FormatError, match="parts must cover channels 0 to 3 once each"):
            Plan.from_document(document, "bomb.json")

    assert peak(refused) < MEGABYTE
    layer = document["layers"][0]
    layer |= {"shape": [1 << 24, 2], "numel": 1 << 25}
    layer["parts"] = [{"bits": 3, "channels": "0-8388607"}, {"bits": 4, "channels": "8388608-16777215"}]

    def read() -> None:
        large = Plan.from_document(document, "large.json")
        assert large.layers[0].bits_text == "3x8388608 4x8388608"
        assert Plan.model_validate_json(large.to_json()) == large
        assert large.size().weights_only_bits == (1 << 24) * 7

    assert peak(read) < MEGABYTE


READERS: dict[str, Callable[[Path], object]] = {
    "plan": Plan.load,
    "table": LayerTable.load,
    "latency": LatencyTable.of,
    "container": Container.open,
    "store": lambda path: Store(path).__enter__(),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_what_never_ends_or_is_too_large_is_refused_unread(read: Callable[[Path], object], tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(3 << 29)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "looks-like-one").symlink_to("/dev/zero")

    def refused() -> None:
        for name in ("large", "pipe", "looks-like-one", "."):
            with pytest.raises(MPQError):
                read(tmp_path / name)

    assert peak(refused) < MEGABYTE
