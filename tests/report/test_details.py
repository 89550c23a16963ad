"""What is said with --verbose: parameters apart from what was found, numbers to four digits."""

import pytest
import torch
from torch import nn

from mpq_plugins import GGML, Affine, Budget, Codebook, EntropyCoded, LayerTable, MixQuant, Piecewise, measure
from mpq_plugins.evaluation.sweep import sweep
from mpq_plugins.plans.scheme import Scheme
from mpq_plugins.report.details import (
    plan_details,
    quantizer_line,
    scheme_words,
    sweep_details,
    table_details,
    value_text,
)
from mpq_plugins.report.sweep import varying_parameters
from mpq_plugins.report.tables import plan_head


@pytest.fixture(scope="module")
def table() -> LayerTable:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    return measure(net, scheme=Affine(granularity="per_channel", range="mse"), bits=range(1, 9), per_channel=True)


def test_the_line_over_a_table_says_what_matters_in_80_columns(table: LayerTable) -> None:
    plan = Budget(average_bits=3.0)(table)
    size = plan.size()
    head = plan_head(plan)
    assert len(head) <= 80
    assert head.startswith(
        f"budget: 2 layers, {size.total_average_bits:.2f} bits a weight in total, {size.total_bytes}"
    )
    assert "objective" not in head


def test_what_was_found_stands_apart_from_the_parameters(table: LayerTable) -> None:
    told, found = plan_details(Budget(average_bits=3.0)(table))
    quantizer = quantizer_line(Budget(average_bits=3.0)(table))
    assert told.startswith("parameters ")
    assert "average_bits=3, " in told
    assert "bits=1-8" in told
    assert found.startswith("found ")
    assert "objective=" in found
    assert "objective" not in told
    assert "binding=average_bits" in found
    assert quantizer == "quantizer     affine, per channel, clipped; activations floating point"
    assert [line.split()[0] for line in plan_details(MixQuant()(table))] == ["parameters"]


def test_what_was_found_labels_no_row_of_a_sweep(table: LayerTable) -> None:
    rows = sweep(table, [Budget(average_bits=average)(table) for average in (2.0, 3.0, 4.0)])
    assert varying_parameters(rows) == {"budget": ["average_bits"]}
    assert [line.split(",")[0] for line in sweep_details(rows)] == ["budget"]
    assert "average_bits" not in sweep_details(rows)[0]


def test_a_table_says_its_quantizer_and_what_it_holds(table: LayerTable) -> None:
    assert table_details(table) == [
        "quantizer     affine, per channel, clipped",
        "errors        relative, mse at 1-8 bits, each by channel too",
    ]


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (Affine(), "affine, per tensor"),
        (Affine(symmetric=True, granularity="per_group", group_size=64), "affine, symmetric, groups of 64"),
        (Affine(granularity="per_channel", range="mse"), "affine, per channel, clipped"),
        (
            Affine(symmetric="full", scale_dtype="float16"),
            "affine, full-range symmetric, per tensor, scales in float16",
        ),
        (Affine(stochastic=7), "affine, per tensor, rounded stochastically (seed 7)"),
        (Piecewise(), "piecewise, per tensor"),
        (Codebook(granularity="per_channel"), "codebook, per channel"),
        (EntropyCoded(), "entropy-coded"),
        (EntropyCoded(step=0.1), "entropy-coded"),
        (GGML(type="q6_k"), "ggml q6_k"),
    ],
)
def test_schemes_in_words(scheme: Scheme, words: str) -> None:
    assert scheme_words(scheme) == words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (75.14338948888334, "75.14"), (3.78e-16, "3.78e-16"), (3.0, "3"), (True, "yes"), (8, "8"),
        ([1, 2, 3, 8], "1-3,8"),
        ([5, 4], "5,4"), ([], ""), (["a", "b"], "a,b"), ({"conv1": 0.123456}, "conv1:0.1235"), ("mse", "mse"),
    ],
)  # fmt: skip
def test_values_as_people_read_them(value: object, text: str) -> None:
    assert value_text(value) == text
