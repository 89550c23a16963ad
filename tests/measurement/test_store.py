"""A measurement that was interrupted goes on from what is intact of its store, and from nothing else."""

import resource
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins import Affine, LayerTable, Minifloat, Piecewise, Store, measure
from mpq_plugins.common import store_file
from mpq_plugins.errors import MeasureWarning, SettingError, SourceError
from mpq_plugins.measurement import measure as run
from mpq_plugins.measurement import units
from mpq_plugins.plans.scheme import Scheme
from mpq_plugins.weights import chunks
from tests.helpers.checkpoints import sharded
from tests.helpers.tables import contents

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEMES: list[Scheme] = [Affine(range="mse"), Affine(granularity="per_channel"), Piecewise(), Minifloat(format="nvfp4")]


@pytest.fixture(scope="module", autouse=True)
def small_units() -> Iterator[None]:
    """Many units, and a layer that is handed out pass by pass, of a checkpoint that takes no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK", 64)
        patch.setattr(units, "SMALLEST", 256)
        patch.setattr(store_file, "PAGE", 512)
        patch.setattr(store_file, "FLUSHED", ("OFF", "OFF"))
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    state = {f"{n}.weight": draw(3, 16) for n in range(4)} | {"large.weight": draw(48, 16).bfloat16()}
    return sharded(tmp_path_factory.mktemp("record") / "model", state)


class StopError(Exception):
    """What comes between a table and its being saved."""


def table_of(source: Path, scheme: Scheme, store: "Path | Store | None", **options: Any) -> LayerTable:
    bits = (4,) if isinstance(scheme, Minifloat) else (2, 4)
    return measure(source, scheme, bits, per_channel=True, store=store, **options)


def left_by(place: Path, measured: Callable[[Store], object]) -> Path:
    """A store that a run left which was interrupted before it saved its table."""
    with suppress(StopError), Store(place) as store:
        measured(store)
        raise StopError
    return place


class Counted:
    """How often workers were asked for anything, passes over parts of a large layer included."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        for name in ("unit_sums", "answers"):
            monkeypatch.setattr(run, name, self.watch(getattr(run, name)))

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            self.calls += 1
            return function(*arguments)

        return watched


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_finished_is_not_measured_again(
    checkpoint: Path, scheme: Scheme, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "table.partial"
    counted = Counted(monkeypatch)
    whole = contents(table_of(checkpoint, scheme, None))
    every, counted.calls = counted.calls, 0

    def interrupt(name: str, done: int, total: int) -> None:
        if 3 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        table_of(checkpoint, scheme, place, progress=interrupt)
    first = counted.calls
    kept = finished_in(place)
    assert 0 < kept <= first
    counted.calls = 0
    left_by(place, lambda store: contents(table_of(checkpoint, scheme, store)))
    assert counted.calls == every - kept
    counted.calls = 0
    assert contents(table_of(checkpoint, scheme, place)) == whole
    assert counted.calls == 0
    assert not place.exists()  # the table is its caller's now


def finished_in(place: Path) -> int:
    with suppress(StopError), Store(place) as store:
        found = len(store)
        raise StopError
    return found


@pytest.fixture(scope="module")
def stores(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Scheme, bytes, object]]:
    """Of each scheme: a store with everything in it, and the table."""
    found: list[tuple[Scheme, bytes, object]] = []
    for scheme in SCHEMES:
        tables: list[object] = []
        place = tmp_path_factory.mktemp("partial") / "whole"
        left_by(place, lambda store: tables.append(contents(table_of(checkpoint, scheme, store))))  # noqa: B023
        found.append((scheme, place.read_bytes(), tables[0]))
    return found


def check_table(checkpoint: Path, scheme: Scheme, place: Path, known: object) -> None:
    """The same table; or a store that cannot be told is refused and left as it is."""
    before = place.read_bytes()
    said = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MeasureWarning)
        try:
            found = contents(table_of(checkpoint, scheme, place))
        except (SettingError, SourceError) as error:
            said = str(error)
    if said:
        assert any(words in said for words in ("is in the way", "newer", "readonly"))
        assert place.read_bytes() == before
        return
    assert found == known
    assert not place.exists()


@given(position=st.integers(0, 1 << 20), which=st.integers(0, len(SCHEMES) - 1))
def test_a_store_cut_anywhere_gives_the_same_table(
    stores: list[tuple[Scheme, bytes, object]],
    checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
    position: int,
    which: int,
) -> None:
    scheme, whole, known = stores[which]
    place = tmp_path_factory.mktemp("cut") / "partial"
    place.write_bytes(whole[: position % len(whole)])
    check_table(checkpoint, scheme, place, known)


@given(position=st.integers(0, 1 << 20), flip=st.integers(1, 255), which=st.integers(0, len(SCHEMES) - 1))
def test_a_store_with_any_byte_flipped_gives_the_same_table(
    stores: list[tuple[Scheme, bytes, object]],
    checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
    position: int,
    flip: int,
    which: int,
) -> None:
    scheme, whole, known = stores[which]
    damaged = bytearray(whole)
    damaged[position % len(whole)] ^= flip
    place = tmp_path_factory.mktemp("flipped") / "partial"
    place.write_bytes(damaged)
    check_table(checkpoint, scheme, place, known)


def test_what_is_no_store_is_not_written_over(checkpoint: Path, tmp_path: Path) -> None:
    place = tmp_path / "notes"
    place.write_text("dear diary")
    with pytest.raises(SettingError, match=r"notes: is in the way, and no store of finished work"):
        table_of(checkpoint, SCHEMES[1], place)
    assert place.read_text() == "dear diary"


def test_what_is_measured_is_no_place_for_what_is_finished(checkpoint: Path, tmp_path: Path) -> None:
    shard = checkpoint / "model-00001-of-00002.safetensors"
    torch.save({"a.weight": torch.randn(4, 4)}, tmp_path / "model.pt")
    for source, place in ((checkpoint, shard), (shard, shard), (tmp_path / "model.pt", tmp_path / "model.pt")):
        before = place.read_bytes()
        with pytest.raises(SettingError, match="is what is measured; name another file"):
            table_of(source, SCHEMES[1], place)
        assert place.read_bytes() == before


@pytest.mark.parametrize("change", ["bits", "metrics", "scheme", "per_channel", "weights", "skip"])
def test_the_store_of_another_measurement_is_refused_and_kept(tmp_path: Path, change: str) -> None:
    source = sharded(tmp_path / "model", {f"{n}.weight": torch.randn(6, 8) for n in range(4)})
    asked: dict[str, Any] = {
        "scheme": Affine(granularity="per_channel"), "bits": (2, 4), "metrics": ("mse",), "per_channel": False,
        "skip": (),
    }  # fmt: skip
    place = left_by(tmp_path / "table.partial", lambda store: measure(source, **asked, store=store))
    before = place.read_bytes()
    given_source, given_options = source, dict(asked)
    if change == "weights":
        given_source = sharded(tmp_path / "other", {f"{n}.weight": torch.randn(6, 8) for n in range(4)})
    else:
        other = {
            "bits": (2, 5), "metrics": ("rmse",), "scheme": Affine(granularity="per_channel", symmetric=True),
            "per_channel": True, "skip": ("0",),
        }  # fmt: skip
        given_options[change] = other[change]
    fact = "weights" if change == "skip" else change
    with pytest.raises(SettingError, match=rf"\.partial: holds what another job finished \(it differs in .*{fact}"):
        measure(given_source, **given_options, store=place)
    assert place.read_bytes() == before
    assert contents(measure(source, **asked, store=place)) == contents(measure(source, **asked))


def test_a_shard_written_since_is_not_believed_to_be_the_same(tmp_path: Path) -> None:
    state = {f"{n}.weight": torch.randn(6, 8) for n in range(4)}
    source = sharded(tmp_path / "model", state)
    place = left_by(tmp_path / "table.partial", lambda store: table_of(source, SCHEMES[1], store))
    shard = source / "model-00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-2] ^= 0x41  # a high byte of the last weight
    shard.write_bytes(content)
    with pytest.raises(SettingError, match=r"another job finished \(it differs in weights\)"):
        table_of(source, SCHEMES[1], place)


def test_weights_in_memory_are_told_apart_to_the_byte(tmp_path: Path) -> None:
    net = torch.nn.Linear(16, 8)
    place = left_by(tmp_path / "table.partial", lambda store: measure(net, store=store))
    with torch.no_grad():
        net.weight[0, 0] = 3.0
    with pytest.raises(SettingError, match=r"another job finished \(it differs in weights\)"):
        measure(net, store=place)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond `size`, in the middle of a write, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9])
def test_a_full_disk_is_said_and_what_was_written_before_is_used(
    checkpoint: Path,
    stores: list[tuple[Scheme, bytes, object]],
    scheme: Scheme,
    share: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, whole, known = stores[SCHEMES.index(scheme)]
    place = tmp_path / "table.partial"
    counted = Counted(monkeypatch)
    table_of(checkpoint, scheme, None)
    every, counted.calls = counted.calls, 0
    with (
        largest_file(int(share * len(whole))),
        pytest.raises(
            SourceError, match=r"table\.partial: cannot write there .*(run again to go on|Make room, or choose)"
        ),
    ):
        table_of(checkpoint, scheme, place)
    kept = finished_in(place) if place.exists() else 0
    counted.calls = 0
    assert contents(table_of(checkpoint, scheme, place)) == known
    assert counted.calls == every - kept
    assert (kept > 0) == (share >= 0.5)
    assert list(tmp_path.iterdir()) == []


def test_the_folders_on_the_way_to_a_store_are_made(checkpoint: Path, tmp_path: Path) -> None:
    place = tmp_path / "runs" / "new" / "x"
    assert contents(table_of(checkpoint, SCHEMES[0], place)) == contents(table_of(checkpoint, SCHEMES[0], None))
    assert list(place.parent.iterdir()) == []


def test_a_folder_in_the_way_is_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="is in the way, and no ordinary file"):
        table_of(checkpoint, SCHEMES[0], tmp_path)


def test_a_store_is_a_path_or_is_open(checkpoint: Path) -> None:
    with pytest.raises(SettingError, match="store: 5 is not allowed; a file's path, or an open Store"):
        table_of(checkpoint, SCHEMES[0], 5)  # type: ignore[arg-type]
