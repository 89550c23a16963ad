"""How inputs are quantized, as `mpq plan` is told."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_model

from mpq_plugins import Activations, Plan
from tests.conftest import Ran
from tests.helpers.nets import conv_net

Mpq = Callable[..., Ran]
GIVEN: list[tuple[list[str], Activations]] = [
    ([], Activations(8)),
    (["--activation-range", "kl"], Activations(8, range="kl")),
    (["--activation-range", "moving_average", "--activation-symmetric"],
     Activations(8, symmetric=True, range="moving_average")),
    (["--activation-range", "percentile"], Activations(8, range="percentile", share=0.9999)),
    (["--activation-range", "percentile", "--activation-share", "0.99"],
     Activations(8, range="percentile", share=0.99)),
    (["--activation-dynamic", "per_tensor"], Activations(8, dynamic="per_tensor")),
]  # fmt: skip
REFUSED = [
    (["--activation-range", "kl"], "activation-range: says how activations are quantized, and no width is given"),
    (["--activation-symmetric"], "activation-symmetric: says how activations are quantized"),
    (["--activation-bits", "1"], "activation_bits: 1 is not allowed; 2 to 16"),
    (["--activation-bits", "8", "--activation-range", "entropy"], "'entropy' is not allowed; minmax, percentile, mse"),
    (["--activation-bits", "8", "--activation-share", "0.9"], "share: belongs to the percentile range, and this is"),
    (["--activation-bits", "8", "--activation-range", "percentile", "--activation-share", "1.5"],
     "share: 1.5 is not allowed; above 0.5, at most 1"),
    (["--activation-bits", "8", "--activation-range", "kl", "--activation-dynamic", "per_tensor"],
     "kl is a static range, and dynamic inputs have the range of their own"),
    (["--activation-bits", "8", "--activation-dynamic", "per_token"], "layer 'conv1': activations: per_token belongs"),
]  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    save_model(conv_net(), str(path))
    return path


@pytest.mark.parametrize(
    ("given", "expected"), GIVEN, ids=lambda each: " ".join(each) if isinstance(each, list) else ""
)
def test_a_plan_says_how_its_inputs_are_quantized(
    mpq: Mpq, checkpoint: Path, tmp_path: Path, given: list[str], expected: Activations
) -> None:
    out = tmp_path / "plan.json"
    mpq("plan", checkpoint, "-a", "uniform", "--activation-bits", 8, *given, "-o", out)
    assert {layer.activations for layer in Plan.load(out).layers} == {expected}


@pytest.mark.parametrize(("given", "said"), REFUSED, ids=lambda each: " ".join(each) if isinstance(each, list) else "")
def test_what_says_nothing_is_refused_and_nothing_is_written(
    mpq: Mpq, checkpoint: Path, tmp_path: Path, given: list[str], said: str
) -> None:
    ran = mpq("plan", checkpoint, "-a", "uniform", *given, "-o", tmp_path / "plan.json")
    assert ran.code == 2
    assert said in " ".join(ran.err.split())
    assert "Traceback" not in ran.err
    assert not (tmp_path / "plan.json").exists()
