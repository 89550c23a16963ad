import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins import Activations, Affine, EntropyCoded, MixQuant, Part, Plan, measure
from mpq_plugins.common.checksum import unsealed
from mpq_plugins.errors import FormatError, SettingError
from mpq_plugins.plans import plan
from tests.helpers.nets import conv_net, tied_net
from tests.helpers.plans import linear, plan_of, plans
from tests.helpers.says import naming

SCHEMA = json.loads((files("mpq_plugins.plans") / "plan.schema.json").read_text())


def test_a_scheme_without_a_name_is_affine() -> None:
    assert Plan.from_document(document(layers__0__scheme__name=...), "old.json").layers[0].scheme == Affine()


@given(plans)
def test_json_round_trips_and_obeys_the_shipped_schema(made: Plan) -> None:
    text = made.to_json()
    document = json.loads(text)
    assert Plan.from_document(document, "test") == made
    assert Plan.from_document(document, "test").to_json() == text
    jsonschema.validate(document, SCHEMA)


def test_the_shipped_schema_is_the_models() -> None:
    assert plan.json_schema() == SCHEMA, "run: python -m mpq_plugins.plans.plan > mpq_plugins/plans/plan.schema.json"


def test_a_file_is_readable_one_line_a_layer(tmp_path: Path) -> None:
    made = MixQuant()(measure(tied_net()))
    made.save(tmp_path / "plan.json")
    lines = (tmp_path / "plan.json").read_text().splitlines()
    assert sum('"name": "embed"' in line and '"bits"' in line and '"tied": ["lm_head"]' in line for line in lines) == 1
    assert Plan.load(tmp_path / "plan.json") == made


def test_channels_are_written_as_runs() -> None:
    made = plan_of(linear("fc", 8, 2, Affine(), {2: (0, 1, 2, 6), 8: (3, 4, 5, 7)}))
    assert '"channels": "0-2,6"' in made.to_json()
    assert Part(bits=2, channels="0-2,6").channels == (0, 1, 2, 6)  # type: ignore[arg-type]


def document(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = unsealed(json.loads(plan_of(linear("fc", 4, 2, Affine(), 4)).to_json()))
    for path, value in changes.items():
        target: Any = base
        *parents, last = path.split("__")
        for key in parents:
            target = target[int(key) if key.isdecimal() else key]
        if value is ...:
            del target[last]
        else:
            target[last] = value
    return base


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 6}, r"plan version 6, and this mpq-plugins reads up to 5\. Upgrade it"),
        ({"version": 0}, "version: 0 is not allowed"),
        ({"version": "1"}, "version: '1' is not allowed"),
        ({"format": "onnx"}, "not a plan"),
        ({"layers__0__bits": 9}, r"layers\[0\]\.bits: 9 is not allowed; 1 to 8"),
        ({"layers__0__bits": 0}, r"layers\[0\]\.bits: 0 is not allowed; 1 to 8"),
        ({"layers__0__bits": 4.0}, r"layers\[0\]\.bits: "),
        ({"layers__0__bits": True}, r"layers\[0\]\.bits: "),
        ({"layers__0__bits": ...}, r"layers\[0\]: layer 'fc': give either bits or parts"),
        ({"layers__0__parts": [{"bits": 2, "channels": "0-3"}]}, "give either bits or parts"),
        ({"layers__0__numel": 9}, r"numel 9 does not fit shape \(4, 2\)"),
        ({"layers__0__shape": []}, r"layers\[0\]\.shape"),
        ({"layers__0__shape": [-4, -2]}, r"layers\[0\]\.shape\[0\]"),
        ({"layers__0__tied": ["fc"]}, "'fc' appears more than once"),
        ({"layers__0__channel_axis": 2}, "channel_axis 2 does not fit"),
        ({"layers__0__scheme__granularity": "per_row"}, r"granularity"),
        ({"layers__0__scheme__rang": "mse"}, r"rang"),
        (
            {"layers__0__scheme__name": "cubic"},
            r"layers\[0\]\.scheme: .*is not allowed; a scheme named affine, piecewise, codebook",
        ),
        ({"layers__0__scheme": 5}, r"layers\[0\]\.scheme: '5': is not allowed; a scheme named"),
        ({"layers__0__scheme": {"name": "piecewise"}, "layers__0__bits": 1}, "bits: 1 is not allowed with two regions"),
        ({"layers__0__scheme": {"name": "piecewise", "symmetric": True}}, "symmetric"),
        ({"layers__0__colour": "red"}, r"layers\[0\]\.colour"),
        ({"fold_bn": ...}, "fold_bn"),
        ({"activation_bits": 0}, "activation_bits"),
        ({"activation_bits": "8"}, "activation_bits"),
        ({"activation_bits": True}, "activation_bits"),
        ({"fold_bn": 1}, "fold_bn"),
        ({"version": True}, "version: True is not allowed"),
        ({"skipped": ["fc"]}, "skipped: 'fc' is a layer as well"),
        ({"skipped": ["head", "head"]}, "skipped: 'head' is a layer as well, or appears more than once"),
        ({"skipped": "fc"}, "skipped"),
        ({"layers__0__kind": "lstm"}, r"layers\[0\]\.kind"),
        ({"layers__0__bits": -3}, r"layers\[0\]\.bits: -3 is not allowed"),
        ({"layers__0__bits": 99}, r"layers\[0\]\.bits: 99 is not allowed"),
        ({"layers__0__bits": "4"}, r"layers\[0\]\.bits"),
        ({"layers__0__numel": "8"}, r"layers\[0\]\.numel"),
        ({"layers__0__shape": [4.0, 2]}, r"layers\[0\]\.shape\[0\]"),
        ({"layers__0__shape": "42"}, r"layers\[0\]\.shape"),
        ({"layers__0__shape": [4, 10**400]}, "is beyond any memory"),
        ({"layers__0__shape": [1 << 25, 0], "layers__0__numel": 0}, "33554432 output channels; 16777216 is the most"),
        ({"layers__0__scheme__symmetric": 1}, r"layers\[0\]\.scheme.*symmetric"),
        ({"layers__0__scheme__group_size": "2"}, r"layers\[0\]\.scheme.*group_size"),
        ({"made_with": {"mpq-plugins": 1}}, "made_with"),
    ],
)
def test_a_damaged_plan_names_file_field_and_value(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document(**changes)))
    with pytest.raises(FormatError, match=message) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "parts",
    [
        [{"bits": 2, "channels": "0-2"}],
        [{"bits": 2, "channels": "0-3"}, {"bits": 4, "channels": "3"}],
        [{"bits": 2, "channels": "0-4"}],
        [{"bits": 2, "channels": "1,0"}, {"bits": 3, "channels": "2-3"}],
        [{"bits": 2, "channels": "0-3"}, {"bits": 4, "channels": []}],
        [{"bits": 2, "channels": "0-x"}],
        [{"bits": 2, "channels": "0-99999999999"}],
    ],
)
def test_parts_cover_every_channel_once(parts: list[dict[str, Any]]) -> None:
    damaged = document(layers__0__bits=...)
    damaged["layers"][0]["parts"] = parts
    with pytest.raises(FormatError, match=r"parts must cover|is no channel"):
        Plan.from_document(damaged, "plan.json")


def test_a_layer_named_twice_is_refused() -> None:
    twice = document()
    twice["layers"] *= 2
    with pytest.raises(FormatError, match="'fc' appears more than once"):
        Plan.from_document(twice, "plan.json")


@pytest.mark.parametrize("text", ["", "[1]", "{", '"plan"', "null", "[" * 100_000])
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(FormatError, match=r"not JSON|not a plan"):
        Plan.load(tmp_path / "plan.json")


def test_a_missing_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot read it"):
        Plan.load(tmp_path / "plan.json")


def test_older_versions_migrate_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "PLAN_VERSION", 7)
    monkeypatch.setitem(plan.MIGRATIONS, 5, lambda old: old | {"version": 6, "fold_bn": True})
    # The model itself still says 5, so the last step brings the document back to it.
    monkeypatch.setitem(plan.MIGRATIONS, 6, lambda old: old | {"version": 5})
    assert Plan.from_document(document(), "plan.json").fold_bn is True


VERSION_1 = """{
  "format": "mpq-plan",
  "version": 1,
  "made_with": {"mpq-plugins": "0.1.0"},
  "allocator": {"name": "uniform", "parameters": {"bits": 4}},
  "model": "sha256:cc59",
  "fold_bn": false,
  "skipped": ["head"],
  "layers": [
    {"name": "fc", "kind": "linear", "shape": [4, 2], "channel_axis": 0, "numel": 8, "parts": PARTS, "scheme": SCHEME}
  ]
}
""".replace("PARTS", '[{"bits": 3, "channels": "0-1,3"}, {"bits": 8, "channels": "2"}]').replace(
    "SCHEME", '{"name": "affine", "symmetric": false, "granularity": "per_tensor", "range": "minmax"}'
)


def test_plans_of_the_version_without_checksums_are_read(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(VERSION_1)
    old = Plan.load(tmp_path / "old.json")
    assert (old.version, old.skipped, old.layers[0].bits_text) == (5, ("head",), "3x3 8x1")
    assert Plan.model_validate_json(old.to_json()) == old


VERSION_2 = (
    """{
  "format": "mpq-plan",
  "version": 2,
  "made_with": {"mpq-plugins": "0.1.0"},
  "allocator": {"name": "budget", "parameters": PARAMETERS},
  "model": "sha256:4f84423b467a9e046f163195b6f79b38b8e1379240cd3334bb6815c7da0fa71b",
  "fold_bn": false,
  "skipped": ["1"],
  "checksum": "36208b75",
  "layers": [
    {"name": "0", "kind": "linear", "shape": [4, 2], "channel_axis": 0, "numel": 8, "parts": PARTS, "scheme": SCHEME}
  ]
}
""".replace("PARTS", '[{"bits": 3, "channels": "0,2"}, {"bits": 8, "channels": "1,3"}]')
    .replace("SCHEME", '{"name": "affine", "symmetric": false, "granularity": "per_channel", "range": "minmax"}')
    .replace("PARAMETERS", '{"average_bits": 5.5, "bits": [3, 8], "objective": 0.00019655901061660375}')
)


def test_plans_of_the_version_that_knew_no_rest_are_read(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(VERSION_2)
    old = Plan.load(tmp_path / "old.json")
    assert (old.version, old.skipped, old.layers[0].bits_text) == (5, ("1",), "3x2 8x2")
    assert old.rest_bytes is None
    assert old.size().model_bytes is None
    assert Plan.model_validate_json(old.to_json()) == old


VERSION_3 = """{
  "format": "mpq-plan",
  "version": 3,
  "made_with": {"mpq-plugins": "0.1.0"},
  "allocator": {"name": "budget", "parameters": {"average_bits": 5.5}, "found": {"objective": 0.00019}},
  "model": "sha256:4f84423b467a9e046f163195b6f79b38b8e1379240cd3334bb6815c7da0fa71b",
  "fold_bn": false,
  "skipped": [],
  "rest_bytes": 16,
  "layers": [
    {"name": "0", "kind": "linear", "shape": [4, 2], "channel_axis": 0, "numel": 8, "parts": PARTS, "scheme": SCHEME}
  ]
}
""".replace("PARTS", '[{"bits": 3, "channels": "0,2"}, {"bits": 8, "channels": "1,3"}]').replace(
    "SCHEME", '{"name": "affine", "symmetric": false, "granularity": "per_channel", "range": "minmax"}'
)


def test_plans_of_the_version_without_coded_bytes_are_read(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(VERSION_3)
    old = Plan.load(tmp_path / "old.json")
    assert (old.version, old.layers[0].coded_bytes, old.layers[0].code_bits) == (5, None, 44)
    assert Plan.model_validate_json(old.to_json()) == old


VERSION_4 = """{
  "format": "mpq-plan",
  "version": 4,
  "made_with": {"mpq-plugins": "0.1.0"},
  "allocator": {"name": "budget", "parameters": {"average_bits": 5.5}, "found": {"objective": 0.00019655901061660375}},
  "model": "sha256:4f84423b467a9e046f163195b6f79b38b8e1379240cd3334bb6815c7da0fa71b",
  "fold_bn": false,
  "skipped": [],
  "rest_bytes": 16,
  "layers": [
    {"name": "0", "kind": "linear", "shape": [4, 2], "channel_axis": 0, "numel": 8, "bits": 8, "scheme": SCHEME}
  ]
}
""".replace("SCHEME", '{"name": "affine", "symmetric": true, "granularity": "per_channel", "range": "minmax"}')


def test_plans_of_the_version_without_types_are_read(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(VERSION_4)
    old = Plan.load(tmp_path / "old.json")
    assert (old.version, old.layers[0].type) == (5, None)
    assert old.layers[0].scheme == Affine(symmetric=True, granularity="per_channel")
    assert old.size().total_bits == 64 + 4 * 32
    assert Plan.model_validate_json(old.to_json()) == old
    assert '"scheme": {"name": "affine", "symmetric": true, "granularity": "per_channel"' in old.to_json()


def test_one_number_of_all_inputs_becomes_each_layers_own() -> None:
    """Of layers with codes; indices, and what goes into layers in float, stay as they are."""
    one = json.loads(VERSION_4) | {"activation_bits": 6}
    (layer,) = one["layers"]
    parts = [{"bits": 32, "channels": "0-2"}, {"bits": 8, "channels": "3"}]
    others = [
        layer | {"name": "parts", "bits": None, "parts": parts},
        layer | {"name": "float", "bits": 16},
        layer | {"name": "words", "kind": "embedding"},
    ]
    one["layers"] += [{key: value for key, value in other.items() if value is not None} for other in others]
    old = Plan.model_validate_json(json.dumps(one))
    assert {own.name: own.activations for own in old.layers} == {
        "0": Activations(6), "parts": Activations(6), "float": None, "words": None,
    }  # fmt: skip
    assert Plan.model_validate_json(old.to_json()) == old
    one["layers"][1]["parts"] = 5
    with pytest.raises(FormatError, match="parts"):
        Plan.model_validate_json(json.dumps(one))
    with pytest.raises(FormatError, match="bits: 1 is not allowed; 2 to 16"):
        Plan.model_validate_json(json.dumps(json.loads(VERSION_4) | {"activation_bits": 1}))


def test_a_promise_of_coded_bytes_is_what_codes_count() -> None:
    made = plan_of(linear("fc", 4, 2, EntropyCoded(step=0.25), 8))
    promised = made.model_copy(update={"layers": (made.layers[0].model_copy(update={"coded_bytes": 3}),)})
    assert (promised.layers[0].code_bits, promised.layers[0].bits_text) == (24, "3.00 coded")
    assert promised.size().total_bits == 24  # the step stands in the plan
    again = Plan.model_validate_json(promised.to_json())
    assert again == promised
    with pytest.raises(FormatError, match="coded_bytes"):
        Plan.from_document(
            promised.document() | {"layers": [promised.document()["layers"][0] | {"coded_bytes": -1}]}, "x"
        )


@pytest.mark.parametrize(
    "change",
    [
        ('"bits": 8', '"bits": 32'),
        ('"coded_bytes": 3', '"coded_bytes": 100000000'),
        ('"scheme": {"name": "entropy_coded", "step": 0.25, "rounding_offset": 0.4}', '"scheme": {"name": "affine"}'),
    ],
)
def test_a_promise_that_no_file_keeps_is_refused(change: tuple[str, str]) -> None:
    made = plan_of(linear("fc", 4, 2, EntropyCoded(step=0.25), 8))
    promised = made.model_copy(update={"layers": (made.layers[0].model_copy(update={"coded_bytes": 3}),)})
    text = "\n".join(line for line in promised.to_json().splitlines() if '"checksum"' not in line)
    assert change[0] in text
    with pytest.raises(FormatError, match=naming("coded_bytes")):
        Plan.model_validate_json(text.replace(*change))


@given(plans, st.integers(0, 10**15))
def test_what_is_beside_the_layers_is_counted_and_kept(made: Plan, rest: int) -> None:
    whole = made.model_copy(update={"rest_bytes": rest})
    assert Plan.model_validate_json(whole.to_json()) == whole
    assert whole.size().model_bytes == made.size().total_bytes + rest
    assert whole.size().total_bits == made.size().total_bits


def test_what_was_edited_says_so_until_the_checksum_is_taken_out() -> None:
    made = plan_of(linear("fc", 4, 2, Affine(), 4))
    edited = made.to_json().replace('"bits": 4', '"bits": 3')
    with pytest.raises(FormatError, match=naming("edited", "'checksum'", "remove")):
        Plan.model_validate_json(edited)
    by_hand = "\n".join(line for line in edited.splitlines() if '"checksum"' not in line)
    assert Plan.model_validate_json(by_hand).layers[0].bits == 3
    assert Plan.model_validate_json(json.dumps(json.loads(made.to_json()), indent=7)) == made  # another layout


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"bits": 4', '"bits": 4, "bits": 4', "'bits' appears twice"),
        ('"bits": 4', '"bits": NaN', "NaN is no number"),
        ('"bits": 4', '"bits": 1e999', "1e999 is beyond all numbers here"),
        ('"bits": 4', '"bits": 4٣', "not JSON"),
        ('"fc"', '"f\\ud800"', "holds half a surrogate pair"),
        ('"parameters": {}', '"parameters": {"a": ' + "[" * 70 + "]" * 70 + "}", "nested more than 64 deep"),
        ('"bits": 4', '"parts": [{"bits": 4, "channels": "0-٣"}]', "'0-٣' is no channel or run of channels"),
        ('"bits": 4', '"parts": [{"bits": 4, "channels": [0, 1, 2, 3]}]', "is no channel or run of channels"),
    ],
)
def test_json_that_others_would_read_otherwise_is_refused(old: str, new: str, message: str) -> None:
    text = json.dumps(document())
    assert old in text
    with pytest.raises(FormatError, match=message):
        Plan.model_validate_json(text.replace(old, new))


def test_diff_lists_what_changed_and_what_only_one_has() -> None:
    before = plan_of(*(linear(name, 4, 2, Affine(), 4) for name in ("a", "b", "c")))
    after = plan_of(*(linear(name, 4, 2, Affine(), bits) for name, bits in (("a", 4), ("b", 3), ("d", 4))))
    found = {d.name: (d.before and d.before.bits, d.after and d.after.bits) for d in before.diff(after)}
    assert found == {"b": (4, 3), "c": (4, None), "d": (None, 4)}
    assert before.diff(before) == ()


def test_activation_bits_are_checked() -> None:
    made = plan_of(linear("fc", 4, 2, Affine(), 4))
    assert made.with_activation_bits(8).layers[0].activation_bits == 8
    with pytest.raises(SettingError, match="activation_bits: 0 is not allowed"):
        made.with_activation_bits(0)


def test_two_runs_give_the_same_bytes() -> None:
    assert MixQuant()(measure(conv_net())).to_json() == MixQuant()(measure(conv_net())).to_json()
