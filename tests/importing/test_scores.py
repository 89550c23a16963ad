"""Scores of AutoScheme and of ModelOpt: each number where it belongs, and what does not fit refused by its name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mpq_plugins import (
    Affine,
    Budget,
    LayerTable,
    Minifloat,
    import_autoround,
    import_modelopt,
    measure,
    measure_types,
)
from mpq_plugins.errors import FormatError, MPQError, SettingError
from tests.conftest import Ran

pytestmark = pytest.mark.usefixtures("one_thread")

ME = __name__
Mpq = Callable[..., Ran]
GROUPS = Affine(symmetric="full", granularity="per_group", group_size=32)
BITS = (2, 4, 8)
NAMES = ("0", "1", "2")


class Recipe:
    """As ModelOpt's own, which a file may hold."""


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 64)).eval()


def loss(name: str, bits: int) -> float:
    return 100.0 ** int(name) * 4.0**-bits


def scheme_file(directory: Path, bits: int, **changes: Any) -> Path:
    """As AutoScheme leaves it; changes: of the scheme, or `document` of the whole."""
    whole = changes.pop("document", {})
    scheme = {"bits": bits, "group_size": 32, "sym": True, "data_type": "int", "act_bits": 16, **changes}
    document = {
        "version": 1, "scheme": scheme, "layer_scores": {name: [1000 * bits, loss(name, bits)] for name in NAMES}
    }  # fmt: skip
    path = directory / f"scheme_{len(list(directory.iterdir())):02}_ab{bits}.json"
    path.write_text(json.dumps({**document, **whole}))
    return path


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    directory = tmp_path / "scores"
    directory.mkdir()
    for bits in (8, 2, 4):
        scheme_file(directory, bits)
    return directory


def test_losses_are_at_the_widths_of_their_schemes(scores: Path, tmp_path: Path) -> None:
    table = import_autoround(scores, measure(net(), GROUPS, BITS))
    assert table.sensitivities == ("autoround",)
    for layer in table.layers:
        assert layer.sensitivities["autoround"].tolist() == [loss(layer.name, bits) for bits in BITS]
    table.save(tmp_path / "t.mpqt")
    budget = Budget(average_bits=5, bits=BITS, sensitivity="autoround", parts=False)
    # All at 4 bits would leave 5120 bits; layer 2 at 8 takes 8192 more, for which layer 0 gives 4096.
    assert [layer.bits for layer in budget(LayerTable.load(tmp_path / "t.mpqt")).layers] == [2, 4, 8]


def test_types_get_the_scores_of_schemes_like_theirs(scores: Path) -> None:
    table = import_autoround(scores, measure_types(net(), ("int8_g32", "int2_g32")))
    for column in table.columns:
        for name, layer in column.by_name.items():
            assert layer.sensitivities["autoround"].tolist() == [loss(name, column.type.bits)]
    with pytest.raises(SettingError, match="mxfp4, and AutoRound's scores are of integers"):
        import_autoround(scores, measure_types(net(), ("mxfp4",)))


@pytest.mark.parametrize(
    ("scheme", "bits", "said"),
    [
        (GROUPS, (2, 3, 4, 8), "no scores of 3 bits symmetric in 32s, which the table has"),
        (Affine(symmetric=False, granularity="per_group", group_size=32), (4,), "4 bits asymmetric in 32s"),
        (Affine(symmetric="full", granularity="per_channel"), (4,), "4 bits symmetric per channel"),
        (Affine(symmetric=True), (4,), "4 bits symmetric per tensor"),
        (Affine(symmetric="full", granularity="per_group", group_size=16), (4,), "4 bits symmetric in 16s"),
        (Minifloat(format="mxfp4"), (4,), "integers with scales"),
    ],
)
def test_a_width_or_scheme_that_was_not_scored_is_named(
    scores: Path, scheme: Any, bits: tuple[int, ...], said: str
) -> None:
    with pytest.raises(SettingError, match=said):
        import_autoround(scores, measure(net(), scheme, bits))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"document": {"version": 2}}, "version 2"),
        ({"document": {"layer_scores": {}}}, "'layer_scores'"),
        ({"document": {"layer_scores": {"0": 0.5}}}, r"layer '0': 0.5 is not \[total bits, loss\]"),
        ({"document": {"layer_scores": {"0": [4, "x"]}}}, "'x' is no finite number"),
        ({"act_bits": 8}, "quantizes inputs to 8 bits"),
        ({"data_type": "mx_fp"}, "'mx_fp'"),
        ({"super_bits": 6}, "scales of scales"),
        ({"sym": None}, "sym are 4, 32, None"),
    ],
)
def test_a_scheme_file_that_says_something_else_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = scheme_file(tmp_path, 4, **changes)
    with pytest.raises(FormatError, match=said):
        import_autoround(path, measure(net(), GROUPS, (4,)))


def test_layers_without_a_score_are_named_and_can_be_skipped(tmp_path: Path) -> None:
    path = scheme_file(tmp_path, 4, document={"layer_scores": {"0": [4, 0.5]}})
    table = measure(net(), GROUPS, (4,))
    with pytest.raises(SettingError, match=r"no score of '1', '2'.*--skip '1' --skip '2'"):
        import_autoround(path, table)
    skipped = import_autoround(path, table, skip=["1", "re:2"])
    assert (skipped.skipped, [layer.name for layer in skipped.layers]) == (("1", "2"), ["0"])
    assert skipped.fingerprint == measure(net(), GROUPS, (4,), skip=["1", "2"]).fingerprint
    for skip, said in (
        (["9"], "matches none of the table's 3 layers"),
        (["*"], "all 3 layers"),
        (["role:lm_head"], "no roles"),
    ):
        with pytest.raises(SettingError, match=said):
            import_autoround(path, table, skip=skip)


def test_two_files_of_one_scheme_are_refused(scores: Path) -> None:
    scheme_file(scores, 4)
    with pytest.raises(SettingError, match="both of 4 bits symmetric in 32s"):
        import_autoround(scores, measure(net(), GROUPS, BITS))


def test_a_layer_whose_groups_are_its_own_is_refused(scores: Path) -> None:
    wide = Affine(symmetric="full", granularity="per_group", group_size=64)
    for file in scores.iterdir():
        document = json.loads(file.read_text())
        file.write_text(json.dumps({**document, "scheme": {**document["scheme"], "group_size": 64}}))
    with pytest.warns(UserWarning, match="groups"):
        table = measure(net(), wide, BITS)
    with pytest.raises(SettingError, match=r"layer '1'.*do not divide into 64s"):
        import_autoround(scores, table)
    assert len(import_autoround(scores, table, skip=["1", "2"]).layers) == 1


STATS = {
    "0.quant_recipe": {
        "formats": ["INT4_BLOCKWISE_WEIGHT_ONLY_CFG(effective-bits: 4.0)", "INT8_CFG", "NONE(effective-bits: 16.0)"],
        "scores": [0.5, 0.125, 0.0], "costs": [1.0, 2.0, 4.0], "module_names": ["0", "1"],
    },
    "2.quant_recipe": {"formats": ["W4A16_CUSTOM", "FP8_DEFAULT_CFG", "INT8_CFG"], "scores": [3, 2, 1]},
}  # fmt: skip


def stats_file(directory: Path, stats: Any = STATS) -> Path:
    path = directory / "search.json"
    path.write_text(json.dumps({"candidate_stats": stats}))
    return path


def of_group(**changes: Any) -> dict[str, Any]:
    return {**STATS, "2.quant_recipe": {**STATS["2.quant_recipe"], **changes}}


def test_a_groups_score_is_divided_so_that_it_adds_up(tmp_path: Path) -> None:
    table = import_modelopt(stats_file(tmp_path), measure(net(), Affine(), (4, 8)))
    curves = {layer.name: layer.sensitivities["modelopt"] for layer in table.layers}
    np.testing.assert_allclose(curves["0"] + curves["1"], [0.5, 0.125], rtol=1e-12)
    np.testing.assert_allclose(curves["0"], np.array([0.5, 0.125]) * 2 / 3, rtol=1e-12)  # 2048 of 3072 weights
    assert curves["2"].tolist() == [3, 1]


def test_a_file_of_torchs_is_read_where_it_holds_numbers_and_texts(tmp_path: Path) -> None:
    held: dict[str, dict[str, Any]] = {name: {**stats} for name, stats in STATS.items()}
    held["2.quant_recipe"]["scores"] = [torch.tensor(3.0), torch.tensor(2.0), torch.tensor(1.0)]
    torch.save({"candidate_stats": held}, tmp_path / "s.pt")
    table = measure(net(), Affine(), (4, 8))
    ours, theirs = import_modelopt(tmp_path / "s.pt", table), import_modelopt(stats_file(tmp_path), table)
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert a.sensitivities["modelopt"].tolist() == b.sensitivities["modelopt"].tolist()
    whole = (tmp_path / "s.pt").read_bytes()
    held["2.quant_recipe"]["formats"] = [Recipe()]
    torch.save({"candidate_stats": held}, tmp_path / "s.pt")
    with pytest.raises(FormatError, match=r"could run code\. Save the scores as JSON"):
        import_modelopt(tmp_path / "s.pt", table)
    (tmp_path / "s.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match="cut short"):
        import_modelopt(tmp_path / "s.pt", table)


@pytest.mark.parametrize(
    ("stats", "error", "said"),
    [
        ({"0.quant_recipe": STATS["0.quant_recipe"]}, SettingError, "no score of '2'"),
        (of_group(formats=["INT4_CFG", "INT8_CFG", "X"]), FormatError, "'X' does not say its bits"),
        (of_group(formats=["INT4_CFG", "INT2_CFG", "INT3_CFG"]), SettingError, "no format has 8 bits"),
        (of_group(formats=["INT4_CFG", "INT8_CFG", "W8A16_CFG"]), SettingError, "has 8 bits, a width"),
        (of_group(formats=["INT4_CFG", "INT8_CFG", "INT8_SMOOTHQUANT_CFG"]), FormatError, "quantizes inputs too"),
        (of_group(formats=["INT4_CFG"]), FormatError, "no lists of the same length"),
        (of_group(scores=[1, 2, None]), FormatError, "None is no finite number"),
        (of_group(module_names=["2", "9"]), SettingError, "scored with '9', which the table lacks"),
        (of_group(module_names=["2", "0"]), FormatError, "'0' has a score in another group too"),
        (of_group(module_names="2"), FormatError, "a list of layers"),
        ({}, FormatError, "candidate_stats"),
    ],
)
def test_scores_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, stats: Any, error: type[MPQError], said: str
) -> None:
    with pytest.raises(error, match=said):
        import_modelopt(stats_file(tmp_path, stats), measure(net(), Affine(), (4, 8)))


def test_tables_that_modelopt_cannot_speak_of_are_refused(tmp_path: Path) -> None:
    path = stats_file(tmp_path)
    with pytest.raises(SettingError, match="give a table of widths"):
        import_modelopt(path, measure_types(net(), ("int4", "int8")))  # type: ignore[arg-type]  # refused
    with pytest.raises(SettingError, match="use affine"):
        import_modelopt(path, measure(net(), Minifloat(format="mxfp4"), (4,)))


def test_the_command_tells_files_apart_by_what_they_hold(scores: Path, tmp_path: Path, mpq: Mpq) -> None:
    measure(net(), GROUPS, BITS).save(tmp_path / "t.mpqt")
    measure(net(), Affine(), (4, 8)).save(tmp_path / "u.mpqt")
    for file, table, name in ((scores, "t", "autoround"), (stats_file(tmp_path), "u", "modelopt")):
        out = tmp_path / f"{name}.mpqt"
        ran = mpq("import", file, "--onto", tmp_path / f"{table}.mpqt", "-o", out, "--json")
        assert ran.code == 0
        assert json.loads(ran.out) == {
            "table": str(out), "format": name, "sensitivity": name, "layers": 3, "skip": []
        }  # fmt: skip
        assert LayerTable.load(out).sensitivities == (name,)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[["model.layers.0.mlp.up_proj", 0.5], ["lm_head", 0.25]]', "is mlx-lm's, one number a layer"),
        ("{}", "none of what is read: imatrix, autoround, modelopt, olive"),
        ("not JSON", "not JSON"),
    ],
)
def test_files_that_cannot_serve_are_refused_in_one_line(tmp_path: Path, mpq: Mpq, text: str, said: str) -> None:
    (tmp_path / "f.json").write_text(text)
    measure(net(), GROUPS, BITS).save(tmp_path / "t.mpqt")
    ran = mpq("import", tmp_path / "f.json", "--onto", tmp_path / "t.mpqt", "-o", tmp_path / "o.mpqt")
    assert ran.code == 2
    assert said in ran.err
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "o.mpqt").exists()
