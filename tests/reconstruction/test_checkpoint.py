"""Finished blocks on disk: read back as they were written or not at all, and only for their own job."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mpq_plugins as mpq
from mpq_plugins import BlockReport, SettingError, SourceError
from mpq_plugins.reconstruction.checkpoint import Checkpoint, job_of
from mpq_plugins.reconstruction.settings import Settings

JOB = {"model": "sha256:1", "plan": "{}", "settings": "steps=5"}
REPORT = BlockReport("layer1.0", ("layer1.0.conv1", "layer1.0.conv2"), 1 / 3, 0.1 + 0.2, 7, 4000, 12.345)
TENSORS = {
    "layer1.0.conv1.weight": torch.arange(12.0).reshape(3, 4),
    "layer1.0.conv2.weight": torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).t(),
    "layer1.0.conv1.input_quantizer.scale": torch.tensor(0.1),
    "layer1.0.empty": torch.zeros(0, 3),
}


def filled(folder: Path) -> Checkpoint:
    checkpoint = Checkpoint(folder, JOB)
    checkpoint.begin()
    checkpoint.write(3, TENSORS, REPORT)
    return checkpoint


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(value) for name, value in other.items())


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    filled(tmp_path / "own")
    found = Checkpoint(tmp_path / "own", dict(JOB)).read(3, "layer1.0")
    assert found is not None
    tensors, report = found
    assert same(tensors, TENSORS)
    assert report == replace(REPORT, resumed=True)


def test_other_positions_and_names_are_not_finished(tmp_path: Path) -> None:
    checkpoint = filled(tmp_path / "own")
    assert checkpoint.read(2, "layer1.0") is None
    assert checkpoint.read(3, "layer1.1") is None


def test_a_block_may_be_written_again(tmp_path: Path) -> None:
    checkpoint = filled(tmp_path / "own")
    checkpoint.write(3, {"x": torch.ones(2)}, replace(REPORT, changed=8))
    found = checkpoint.read(3, "layer1.0")
    assert found is not None
    assert same(found[0], {"x": torch.ones(2)})
    assert found[1].changed == 8
    assert sorted(path.name for path in checkpoint.folder.iterdir()) == ["00003.safetensors", "job.json"]


def test_parents_are_made(tmp_path: Path) -> None:
    filled(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "job.json").is_file()


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_truncated_file_is_not_finished(tmp_path: Path, data: st.DataObject) -> None:
    checkpoint = filled(tmp_path / "own")
    path = checkpoint.folder / "00003.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert checkpoint.read(3, "layer1.0") is None


def test_more_than_was_written_is_not_finished(tmp_path: Path) -> None:
    checkpoint = filled(tmp_path / "own")
    path = checkpoint.folder / "00003.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    assert checkpoint.read(3, "layer1.0") is None


def test_a_header_with_a_flipped_byte_is_not_finished(tmp_path: Path) -> None:
    checkpoint = filled(tmp_path / "own")
    path = checkpoint.folder / "00003.safetensors"
    whole = path.read_bytes()
    believed = []
    for position in range(8 + int.from_bytes(whole[:8], "little")):
        for flip in (0x01, 0x10, 0x80):
            damaged = bytearray(whole)
            damaged[position] ^= flip
            path.write_bytes(damaged)
            found = checkpoint.read(3, "layer1.0")
            if found is not None and not (same(found[0], TENSORS) and found[1] == replace(REPORT, resumed=True)):
                believed.append((position, flip))
    assert believed == []


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}", b"not a file of ours"])
def test_other_files_in_its_place_are_not_finished(tmp_path: Path, content: bytes) -> None:
    checkpoint = filled(tmp_path / "own")
    (checkpoint.folder / "00003.safetensors").write_bytes(content)
    assert checkpoint.read(3, "layer1.0") is None


def test_a_folder_in_a_files_place_is_not_finished(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "own", JOB)
    checkpoint.begin()
    (checkpoint.folder / "00003.safetensors").mkdir()
    assert checkpoint.read(3, "layer1.0") is None
    with pytest.raises(SourceError, match="is a directory"):
        checkpoint.write(3, TENSORS, REPORT)


@pytest.mark.parametrize("other", [{**JOB, "settings": "steps=6"}, {"model": "sha256:1"}, {**JOB, "more": ""}])
def test_another_jobs_folder_is_refused(tmp_path: Path, other: dict[str, str]) -> None:
    checkpoint = filled(tmp_path / "own")
    before = sorted(checkpoint.folder.iterdir())
    with pytest.raises(SettingError, match=r"checkpoint: .*own holds blocks of another job"):
        Checkpoint(tmp_path / "own", other)
    assert sorted(checkpoint.folder.iterdir()) == before
    assert checkpoint.read(3, "layer1.0") is not None


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_job_is_another(tmp_path: Path, content: bytes) -> None:
    filled(tmp_path / "own")
    (tmp_path / "own" / "job.json").write_bytes(content)
    with pytest.raises(SettingError, match="holds blocks of another job"):
        Checkpoint(tmp_path / "own", JOB)


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(SettingError, match="is not empty, and no checkpoint of ours"):
        Checkpoint(tmp_path, JOB)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, JOB)
    assert not list(tmp_path.iterdir())  # what is refused later leaves nothing behind
    checkpoint.begin()
    assert [path.name for path in tmp_path.iterdir()] == ["job.json"]


def test_a_folder_without_a_finished_block_may_be_another_jobs(tmp_path: Path) -> None:
    Checkpoint(tmp_path, {**JOB, "settings": "steps=6"}).begin()
    Checkpoint(tmp_path, JOB).begin()
    assert json.loads((tmp_path / "job.json").read_text()) == JOB


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own").write_bytes(b"mine")
    with pytest.raises(SettingError, match="own is no folder"):
        Checkpoint(tmp_path / "own", JOB)
    with pytest.raises(SourceError, match="cannot be made"):
        Checkpoint(tmp_path / "own" / "inside", JOB).begin()
    assert (tmp_path / "own").read_bytes() == b"mine"


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


def test_settings_that_were_refused_do_not_keep_the_folder(tmp_path: Path) -> None:
    """Nothing was finished, so the mended call may go on there."""
    folder = tmp_path / "own"
    batches = [torch.randn(8, 4, generator=torch.Generator().manual_seed(0))]
    with pytest.raises(SettingError, match="match no module"):
        mpq.reconstruct(net(), plan_of(net()), batches, steps=2, checkpoint=folder, blocks="layer9")
    mpq.reconstruct(net(), plan_of(net()), batches, steps=2, checkpoint=folder, blocks="0")


def test_a_damaged_block_is_learned_again(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    batches = [torch.randn(8, 4, generator=torch.Generator().manual_seed(0))]
    reports: list[BlockReport] = []

    def learn() -> dict[str, Tensor]:
        reports.clear()
        model = mpq.reconstruct(
            net(), plan_of(net()), batches, steps=5, lr=0.1, checkpoint=folder, finished=reports.append
        )
        return model.state_dict()

    whole = learn()
    path = folder / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert same(learn(), whole)
    assert [report.resumed for report in reports] == [True, False]
    learn()
    assert [report.resumed for report in reports] == [True, True]
