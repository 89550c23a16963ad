"""Finished blocks in a store: read back as they were written, or not at all."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mpq_plugins as mpq
from mpq_plugins import BlockReport, SettingError, Store
from mpq_plugins.errors import MeasureWarning
from mpq_plugins.reconstruction.finished import FinishedBlocks, job_of
from mpq_plugins.reconstruction.settings import Settings

REPORT = BlockReport("layer1.0", ("layer1.0.conv1", "layer1.0.conv2"), 1 / 3, 0.1 + 0.2, 7, 4000, 12.345)
TENSORS = {
    "layer1.0.conv1.weight": torch.arange(12.0).reshape(3, 4),
    "layer1.0.conv2.weight": torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).t(),
    "layer1.0.conv1.input_quantizer.scale": torch.tensor(0.1),
    "layer1.0.empty": torch.zeros(0, 3),
}


JOB = {"model": "sha256:1", "plan": "{}", "settings": "steps=5"}


class StopError(Exception):
    """What ends a run."""


@contextmanager
def blocks(path: Path) -> Iterator[FinishedBlocks]:
    """Those of a store that is kept."""
    with suppress(StopError), Store(path) as store:
        yield FinishedBlocks(store.job("reconstruct", JOB))
        raise StopError


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(value) for name, value in other.items())


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    with blocks(tmp_path / "store") as written:
        written.write(3, TENSORS, REPORT)
    with blocks(tmp_path / "store") as again:
        found = again.read(3, "layer1.0")
        assert again.read(2, "layer1.0") is None
        assert again.read(3, "layer1.1") is None
    assert found is not None
    tensors, report = found
    assert same(tensors, TENSORS)
    assert report == replace(REPORT, resumed=True)


def test_a_block_may_be_written_again(tmp_path: Path) -> None:
    with blocks(tmp_path / "store") as written:
        written.write(3, TENSORS, REPORT)
        written.write(3, {"x": torch.ones(2)}, replace(REPORT, changed=8))
        found = written.read(3, "layer1.0")
    assert found is not None
    assert same(found[0], {"x": torch.ones(2)})
    assert found[1].changed == 8


@given(st.binary(max_size=60), st.integers(0, 400))
@settings(max_examples=100)
def test_what_is_no_block_is_not_finished(tmp_path_factory: pytest.TempPathFactory, data: bytes, cut: int) -> None:
    """Whatever a unit of that name holds: what it says is believed only where it is a block."""
    with Store(tmp_path_factory.mktemp("store") / "store") as store:
        finished = store.job("reconstruct", JOB)
        written = FinishedBlocks(finished)
        written.write(3, TENSORS, REPORT)
        (name,) = finished
        whole = finished.take(name)
        for other in (data, whole[: cut % len(whole)] + data, (2).to_bytes(8, "little") + b"{}", b"\xff" * 64):
            finished.add(name, other)
            found = written.read(3, "layer1.0")
            assert found is None or same(found[0], TENSORS)


def test_cached_inputs_of_a_run_that_was_killed_go_with_the_next(tmp_path: Path) -> None:
    for name in ("out.partial-cache-abc", "out.partial-notes", "other.partial-cache-abc"):
        (tmp_path / name).mkdir()
    with blocks(tmp_path / "out.partial"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.partial-cache-abc", "out.partial-notes"]


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()


def plan_of(model: nn.Module, bits: int = 3) -> mpq.Plan:
    return mpq.Uniform(bits=bits)(mpq.measure(model, bits=(bits,)))


def test_a_job_is_another_where_anything_that_decides_it_is() -> None:
    def settings_of(**changes: object) -> Settings:
        given: dict[str, object] = {
            "blocks": (), "steps": 5, "batch_size": 8, "lr": 0.01, "loss": "mse", "regulariser": 0.01, "mix": 0.0,
            "correct": False, "tune": "rounding", "seed": 0,
        }  # fmt: skip
        return Settings(**given | changes)  # type: ignore[arg-type]

    cpu, ones = torch.device("cpu"), [torch.ones(2, 4)]
    jobs = [
        job_of(net(), plan_of(net()), ones, settings_of(), cpu),
        job_of(net(1), plan_of(net()), ones, settings_of(), cpu),
        job_of(net(), plan_of(net(), 4), ones, settings_of(), cpu),
        job_of(net(), plan_of(net()).with_activation_bits(8), ones, settings_of(), cpu),
        job_of(net(), plan_of(net()), [torch.ones(2, 4), torch.ones(2, 4)], settings_of(), cpu),
        job_of(net(), plan_of(net()), [torch.zeros(2, 4)], settings_of(), cpu),
        job_of(net(), plan_of(net()), ones, settings_of(), torch.device("cuda")),
        *(
            job_of(net(), plan_of(net()), ones, settings_of(**changes), cpu)
            for changes in (
                {"blocks": ("0",)}, {"steps": 6}, {"batch_size": 9}, {"lr": 0.02}, {"loss": "fisher"},
                {"regulariser": 0.02}, {"mix": 0.5}, {"correct": True}, {"tune": "norms"}, {"seed": 1},
            )
        ),
    ]  # fmt: skip
    assert all(one != other for k, one in enumerate(jobs) for other in jobs[:k])
    assert jobs[0] == job_of(net(), plan_of(net()), [torch.ones(2, 4)], settings_of(), cpu)


def test_settings_that_were_refused_leave_no_store(tmp_path: Path) -> None:
    """Nothing was finished, so the mended call may begin there."""
    place = tmp_path / "out.partial"
    batches = [torch.randn(8, 4, generator=torch.Generator().manual_seed(0))]
    with pytest.raises(SettingError, match="match no module"):
        mpq.reconstruct(net(), plan_of(net()), batches, steps=2, store=place, blocks="layer9")
    assert list(tmp_path.iterdir()) == []
    mpq.reconstruct(net(), plan_of(net()), batches, steps=2, store=place, blocks="0")
    assert list(tmp_path.iterdir()) == []  # the model is its caller's now


def test_the_folders_on_the_way_to_a_store_are_made(tmp_path: Path) -> None:
    place = tmp_path / "runs" / "new" / "x"
    batches = [torch.randn(8, 4, generator=torch.Generator().manual_seed(0))]
    learned = mpq.reconstruct(net(), plan_of(net()), batches, steps=2, store=place)
    assert list(place.parent.iterdir()) == []
    assert same(learned.state_dict(), mpq.reconstruct(net(), plan_of(net()), batches, steps=2).state_dict())


def test_a_damaged_block_is_learned_again(tmp_path: Path) -> None:
    place = tmp_path / "out.partial"
    batches = [torch.randn(8, 4, generator=torch.Generator().manual_seed(0))]
    reports: list[BlockReport] = []

    def learn() -> dict[str, Tensor]:
        reports.clear()
        with suppress(StopError), Store(place) as store:
            model = mpq.reconstruct(
                net(), plan_of(net()), batches, steps=5, lr=0.1, store=store, finished=reports.append
            )
            raise StopError
        return model.state_dict()

    whole = learn()
    with closing(sqlite3.connect(place)) as connection:
        connection.execute(
            "UPDATE unit SET data = substr(data, 1, length(data) - 1) WHERE CAST(name AS TEXT) LIKE '00001%'"
        )
        connection.commit()
    with pytest.warns(MeasureWarning, match=r"out\.partial: is damaged; 1 of its units"):
        assert same(learn(), whole)
    assert [report.resumed for report in reports] == [True, False]
    learn()
    assert [report.resumed for report in reports] == [True, True]
