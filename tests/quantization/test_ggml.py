"""Rounding to ggml's types: what the package gguf reads of the bytes is the oracle, and where it rounds, its bytes."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch import nn

from mpq_plugins import GGML, Budget, SettingError, Uniform, WeightError, apply, compensate, compress, measure, verify
from mpq_plugins.checkpoints import gguf_blocks
from mpq_plugins.plans.ggml import TYPES, TypeName
from mpq_plugins.quantization import ggml, ggml_library
from mpq_plugins.quantization.quantize import fake_quantize

SLOW = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s")  # thousands of weights a second
FAST: list[TypeName] = [kind for kind in TYPES if kind not in SLOW]  # type: ignore[misc]
Rows = NDArray[np.float32]


def rows_of(seed: int, rows: int, columns: int, scale: float = 0.02) -> Rows:
    return np.random.default_rng(seed).normal(0, scale, (rows, columns)).astype(np.float32)


def values_of(blocks: NDArray[np.uint8], kind: str) -> Rows:
    """By the package gguf, asked without any code of ours."""
    made: Rows = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind.upper()])
    return made


@pytest.mark.parametrize("kind", [*FAST, "iq1_m", "iq2_xxs"])  # of the others ggml's tables take half a minute
def test_blocks_are_the_types_and_come_near_the_weights(kind: TypeName) -> None:
    rows = rows_of(0, 1 if kind in SLOW else 4, 512 if kind not in SLOW else 256)
    blocks = ggml.quantize_rows(rows, kind)
    assert blocks.dtype == np.uint8
    assert blocks.nbytes * 8 == rows.size * GGML(type=kind).bits_per_weight
    error = np.square(rows - values_of(blocks, kind)).sum() / np.square(rows).sum()
    assert error < min(0.7, 12 * 4.0 ** -TYPES[kind].bits)  # a bit more is a quarter of the error
    assert len(np.unique(values_of(blocks[:1, : TYPES[kind].size], kind))) <= TYPES[kind].values


@pytest.mark.parametrize("kind", ggml.PLAIN)
@given(rows=arrays(np.float32, (2, 256), elements=st.floats(-100, 100, width=32, allow_subnormal=False)))
@settings(max_examples=20, deadline=None)
def test_the_library_and_the_package_gguf_round_to_the_same_bytes(kind: TypeName, rows: Rows) -> None:
    ours = ggml.quantize_rows(rows, kind)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind.upper()])
    assert np.array_equal(values_of(ours, kind), values_of(theirs, kind))  # -0 is 0


@pytest.mark.parametrize("kind", FAST)
def test_a_measured_error_is_that_of_the_bytes_in_a_file(kind: TypeName) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(512, 24), nn.Linear(256, 8)).requires_grad_(False)
    scheme = GGML(type=kind)
    table = measure(net, scheme, bits=(scheme.bits,), metrics=("mse", "max_abs"), per_channel=True)
    plan = Uniform(bits=scheme.bits)(table)
    made = apply(net, plan)
    for name, stats in zip("01", table.layers, strict=True):
        weight = net.get_submodule(name).get_parameter("weight").numpy()
        read = values_of(ggml.quantize_rows(weight, kind), kind)
        error = np.square(weight.astype(np.float64) - read).mean()
        assert table.error(stats, "mse", scheme.bits) == pytest.approx(error, rel=1e-9)
        assert table.error(stats, "max_abs", scheme.bits) == np.abs(weight.astype(np.float64) - read).max()
        assert made.get_submodule(name).get_parameter("weight").numpy().tobytes() == read.tobytes()
    checks = verify(made, plan, net)
    assert [check.allowed for check in checks] == [TYPES[kind].values] * 2


@pytest.mark.parametrize("kind", [kind for kind in FAST if TYPES[kind].has_zero])
@given(rows=arrays(np.float32, (1, 256), elements=st.sampled_from([0.0, 0.5, -1.0, 3.0])))
@settings(max_examples=20, deadline=None)
def test_zeros_stay_zero_where_the_scheme_says_so(kind: TypeName, rows: Rows) -> None:
    assert (ggml.rounded_rows(rows, kind)[rows == 0] == 0).all()


def test_what_matters_more_comes_out_nearer() -> None:
    rows, importance = rows_of(1, 16, 256), np.ones(256, np.float32)
    importance[::2] = 1000
    plain, weighted = (
        np.square(rows - ggml.rounded_rows(rows, "q4_k", given))[:, ::2].sum() for given in (None, importance)
    )
    assert weighted < 0.9 * plain


@pytest.mark.parametrize(
    "importance", [np.ones(255), -np.ones(256), np.full(256, np.nan), np.full(256, np.inf), np.ones((1, 256))]
)
def test_an_importance_that_is_none_is_refused(importance: Rows) -> None:
    with pytest.raises(SettingError, match=r"^importance: 256 finite numbers of 0 or more are needed"):
        ggml.quantize_rows(rows_of(0, 2, 256), "q4_k", importance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_keep_their_dtype_and_axis(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    made = fake_quantize(weight, 5, GGML(type="q5_0"), channel_axis=1)
    read = values_of(ggml.quantize_rows(weight.float().T.numpy(), "q5_0"), "q5_0")
    assert made.equal(torch.from_numpy(read.copy()).T.to(dtype))


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.full((2, 64), float("nan")), WeightError, "layer 'fc': 128 of 128 weights are NaN"),
        (torch.full((2, 64), 1e9), WeightError, r"layer 'fc': ggml's q4_0: weights up to 1e\+09 are beyond"),
        (torch.ones(2, 48), SettingError, "layer 'fc': ggml's q4_0 has blocks of 32"),
        (torch.ones(2, 32, 3), SettingError, "layer 'fc': ggml's q4_0 has blocks of 32"),
    ],
)
def test_what_cannot_be_rounded_is_refused_by_name(weight: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        fake_quantize(weight, 4, GGML(type="q4_0"), layer="fc")


def test_nan_and_infinity_never_reach_the_library() -> None:
    with pytest.raises(WeightError, match=r"^ggml's q4_k: weights are NaN or infinite"):
        ggml.quantize_rows(np.full((1, 256), np.inf, np.float32), "q4_k")


def test_empty_weights_stay_empty() -> None:
    assert ggml.rounded_rows(np.zeros((0, 256), np.float32), "q4_k").shape == (0, 256)
    assert fake_quantize(torch.zeros(3, 0), 4, GGML()).shape == (3, 0)


def test_containers_and_other_roundings_refuse_it_by_name(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(256, 8))
    plan = Uniform(bits=4)(measure(net, GGML(), bits=(4,)))
    for refused in (
        lambda: compress(net, plan, tmp_path / "net.mpq"),
        lambda: compensate(net, plan, [torch.randn(4, 256)]),
    ):
        with pytest.raises(SettingError, match="layer '0': ggml's q4_k is stored in GGUF files alone"):
            refused()
    assert not any(tmp_path.iterdir())


def test_a_limit_counts_what_blocks_take() -> None:
    table = measure(nn.Sequential(nn.Linear(256, 8)), GGML(), bits=(4,))
    assert Budget(total_average_bits=4.5, bits=(4,), parts=False)(table).size().total_average_bits == 4.5
    with pytest.raises(SettingError):
        Budget(total_average_bits=4.49, bits=(4,), parts=False)(table)


def hidden(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    find: Any = find_spec
    for module in (ggml, ggml_library, gguf_blocks):
        monkeypatch.setattr(module, "find_spec", lambda name: None if name in packages else find(name))
    ggml_library.library.cache_clear()


def test_without_the_library_the_plain_types_are_the_package_ggufs(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(2, 3, 64)
    before = ggml.quantize_rows(rows, "q4_0")
    hidden(monkeypatch, "xllamacpp")
    assert ggml.quantize_rows(rows, "q4_0").tobytes() == before.tobytes()
    with pytest.raises(SettingError, match=r"q6_k is rounded by xllamacpp, which is not installed: pip .*\[gguf\]"):
        ggml.quantize_rows(rows_of(2, 3, 256), "q6_k")
    ggml_library.library.cache_clear()


def test_without_the_extra_its_name_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden(monkeypatch, "gguf")
    with pytest.raises(SettingError, match=r"^layer 'fc': type: ggml's q4_k needs gguf, which is not .*\[gguf\]"):
        fake_quantize(torch.ones(2, 256), 4, GGML(), layer="fc")
    ggml_library.library.cache_clear()


def test_a_library_with_other_blocks_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TYPES, "q4_k", TYPES["q4_k"]._replace(size=145))
    with pytest.raises(SettingError, match=r"^type: the installed xllamacpp has no q4_k, or another than we know"):
        ggml.quantize_rows(rows_of(0, 1, 256), "q4_k")
