"""`measure(cache=)`: a table is read where it answers, and measured and written anew where it does not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpq_plugins import Affine, FormatError, LayerTable, SettingError, Store, WeightError, measure
from mpq_plugins.common.files import claimed
from mpq_plugins.measurement import measure as run
from tests.helpers.nets import conv_net
from tests.helpers.tables import contents


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As long as there were units measured."""
    calls: list[int] = []
    whole = getattr(run, "unit_sums")  # noqa: B009

    def call(*given: Any) -> Any:
        calls.append(1)
        return whole(*given)

    monkeypatch.setattr(run, "unit_sums", call)
    return calls


def test_the_second_time_it_is_read(tmp_path: Path, measured: list[int]) -> None:
    cache = tmp_path / "net.mpqt"
    first = measure(conv_net(), cache=cache)
    assert measured
    measured.clear()
    assert contents(measure(conv_net(), cache=str(cache))) == contents(first) == contents(measure(conv_net()))
    measured.clear()
    measure(conv_net(), bits=(3, 4), metrics=("mse",), cache=cache)  # it has more than is asked for
    assert not measured
    assert [path.name for path in tmp_path.iterdir()] == ["net.mpqt"]


@pytest.mark.parametrize(
    "other",
    [{"bits": (1, 2)}, {"metrics": ("rmse",)}, {"per_channel": True}, {"scheme": Affine(symmetric=True)},
     {"skip": ("fc*",)}, {"fold_bn": False}, {"source": "changed"}],
    ids=str,
)  # fmt: skip
def test_a_table_that_does_not_answer_is_measured_again(
    tmp_path: Path, other: dict[str, Any], measured: list[int]
) -> None:
    cache = tmp_path / "net.mpqt"
    measure(conv_net(), cache=cache)
    changed = conv_net()
    with torch.no_grad():
        next(changed.parameters()).mul_(2)
    given = {"source": conv_net()} | other | ({"source": changed} if "source" in other else {})
    measured.clear()
    found = measure(**given, cache=cache)
    assert measured
    assert contents(LayerTable.load(cache)) == contents(found) == contents(measure(**given))


def test_multiply_accumulates_are_counted_on_what_is_read_too(tmp_path: Path) -> None:
    cache = tmp_path / "net.mpqt"
    image = torch.zeros(1, 3, 8, 8)
    measure(conv_net(), cache=cache)
    counted = measure(conv_net(), cache=cache, example_input=image)
    assert [layer.macs for layer in counted.layers] == [
        layer.macs for layer in measure(conv_net(), example_input=image).layers
    ]
    with pytest.raises(SettingError, match="example_input: "):
        measure(cache, cache=cache, example_input=image)


def test_what_is_no_table_is_left_alone(tmp_path: Path) -> None:
    cache = tmp_path / "notes"
    cache.write_text("mine")
    with pytest.raises(SettingError, match="notes exists and is no table"):
        measure(conv_net(), cache=cache)
    assert cache.read_text() == "mine"
    measure(conv_net(), cache=tmp_path / "net.mpqt")
    data = bytearray((tmp_path / "net.mpqt").read_bytes())
    data[-1] ^= 1
    (tmp_path / "net.mpqt").write_bytes(data)
    with pytest.raises(FormatError, match=r"net\.mpqt"):
        measure(conv_net(), cache=tmp_path / "net.mpqt")


def test_two_runs_do_not_write_one_table(tmp_path: Path) -> None:
    with claimed(tmp_path / "net.mpqt"), pytest.raises(SettingError, match="another run is writing it"):
        measure(conv_net(), cache=tmp_path / "net.mpqt")


def test_an_interrupted_measurement_goes_on_beside_the_table(tmp_path: Path) -> None:
    cache = tmp_path / "net.mpqt"

    def stop(name: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(conv_net(), cache=cache, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["net.mpqt.partial"]
    measure(conv_net(), cache=cache)
    assert [path.name for path in tmp_path.iterdir()] == ["net.mpqt"]


def test_a_store_of_ones_own_is_used_instead(tmp_path: Path) -> None:
    with Store(tmp_path / "mine") as store:
        measure(conv_net(), cache=tmp_path / "net.mpqt", store=store)
        assert len(store)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "mine-wal", "net.mpqt"]
    assert [path.name for path in tmp_path.iterdir()] == ["net.mpqt"]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("store", ["net.mpqt", "./net.mpqt", "folder/../net.mpqt", "link", "hard"])
def test_a_store_is_not_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str, there: bool, measured: list[int]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("link").symlink_to("net.mpqt")
    if there:
        measure(conv_net(), cache="net.mpqt")
        Path("hard").hardlink_to("net.mpqt")
        measured.clear()
    elif store == "hard":
        return
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for given in (store, tmp_path / store, Store(store)):
        with pytest.raises(SettingError, match=r"^store: .* is the cache; name another file$"):
            measure(conv_net(), bits=(1,), cache="net.mpqt", store=given)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert not measured


def test_a_table_saved_where_its_store_was_stays(tmp_path: Path) -> None:
    path = tmp_path / "net.mpqt"
    with Store(path) as store:
        measure(conv_net(), store=store).save(path)
    assert contents(LayerTable.load(path)) == contents(measure(conv_net()))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("cache", [3, True, b"net.mpqt", 1.5, [], ""])
def test_a_cache_is_a_path(cache: Any, measured: list[int]) -> None:
    with pytest.raises(SettingError, match=r"^cache: .* is not allowed; a file's path$"):
        measure(conv_net(), cache=cache)
    assert not measured


def test_what_cannot_be_measured_leaves_nothing(tmp_path: Path) -> None:
    net = nn.Linear(4, 4)
    with torch.no_grad():
        net.weight[0, 0] = torch.nan
    with pytest.raises(WeightError):
        measure(net, cache=tmp_path / "net.mpqt")
    assert list(tmp_path.iterdir()) == []
