"""The studies, on few images and few settings: what they print is tried, its numbers are `make examples`'."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import mpq_plugins as mpq
from examples import study_alpha, study_cost, study_rounding, study_samples, study_sensitivity
from examples.cifar_resnet import resnet20

pytestmark = [pytest.mark.usefixtures("zoo"), pytest.mark.usefixtures("one_thread")]

Run = Callable[..., str]


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, with_few_images: Callable[[ModuleType], None]
) -> Run:
    def ran(example: ModuleType, *words: object) -> str:
        if hasattr(example, "images"):
            with_few_images(example)
        monkeypatch.setattr(sys, "argv", [example.__name__, *map(str, words)])
        example.main()
        return capsys.readouterr().out

    return ran


def drawn(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 60_000


def test_sensitivity_by_type_and_position(run: Run, tmp_path: Path) -> None:
    out = run(study_sensitivity, "--nets", 20, "--bits", 8, 2, "--plot", tmp_path / "a.png")
    assert "one type at these bits" in out
    assert "stage 3" in out
    assert "of 20" in out
    assert drawn(tmp_path / "a.png")


def test_one_type_alone_has_the_width() -> None:
    plan = study_sensitivity.one_type(mpq.measure(resnet20(), bits=(2, 8)), study_sensitivity.RESNET["stage 1"], 2)
    assert {layer.name for layer in plan.layers if layer.bits == 2} == {
        layer.name for layer in plan.layers if layer.name.startswith("layer1.")
    }
    assert {layer.bits for layer in plan.layers} == {2, 8}


def test_alpha_on_other_data(run: Run, tmp_path: Path) -> None:
    out = run(study_alpha, "--data", "jpeg", "digits", "--alphas", 0.5, "--plot", tmp_path / "a.png")
    assert "alpha 0.5" in out
    assert "digits, 6 layers" in out
    assert drawn(tmp_path / "a.png")


def test_the_other_way_round_has_as_many_important_layers_and_none_of_the_same() -> None:
    table = mpq.measure(resnet20(), study_alpha.SCHEME, (3, 4, 5))
    high = mpq.PTILMPQ(alpha=1.0)(table).by_name
    plans = (mpq.PTILMPQ(alpha=0.5)(table), study_alpha.other_way(table, 0.5))
    first, second = ({layer.name for layer in plan.layers if layer == high[layer.name]} for plan in plans)
    assert len(first) == len(second) == 10
    assert not first & second


def test_compressed_images_are_near_and_others() -> None:
    exact = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).mul(0.5)
    made, labels = study_alpha.compressed(exact, torch.tensor([1, 2]))
    assert labels.tolist() == [1, 2]
    assert 0.01 < float((made - exact).abs().mean()) < 1


def test_how_many_samples(run: Run, tmp_path: Path) -> None:
    words = ("--methods", "corrected", "output_mse", "--samples", 16, 32, "--draws", 1)
    out = run(study_samples, *words, "--plot", tmp_path / "a.png")
    assert all(name in out for name in ("corrected", "output_mse", "32"))
    assert drawn(tmp_path / "a.png")


def test_what_it_costs(run: Run, tmp_path: Path) -> None:
    methods = ("measure, min-max", "Uniform", "corrected")
    out = run(study_cost, "--nets", 20, "--methods", *methods, "--plot", tmp_path / "a.png")
    assert all(name in out for name in (*methods, "MiB"))
    assert drawn(tmp_path / "a.png")


def test_roundings(run: Run) -> None:
    out = run(study_rounding, "--bits", 3, "--seeds", 2, "--steps", 0, "--ranges", "minmax")
    assert "stochastic, corr." in out
