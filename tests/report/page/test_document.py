"""What a page embeds: numbers to the last bit, names that cannot end their element, plans with their commands."""

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import mpq_plugins as mpq
from mpq_plugins.allocation.make import plan_of
from mpq_plugins.common.files import write_text
from mpq_plugins.errors import SettingError
from mpq_plugins.quantization.quantize import fake_quantize
from mpq_plugins.report.page import frontier as frontier_module
from mpq_plugins.report.page.commands import plan_command
from mpq_plugins.report.page.distribution import distributions
from mpq_plugins.report.page.document import PageDocument, page_of_plans, page_of_table
from mpq_plugins.report.page.measured import Measured
from mpq_plugins.report.page.packed import doubles, permutations
from mpq_plugins.report.page.writer import embedded, page_html, script
from tests.conftest import Ran
from tests.helpers.nets import conv_net
from tests.helpers.synthetic_tables import llama_7b, many_layers, resnet152, synthetic_table
from tests.report.page.nets import bare, bare_html, demo_table

Mpq = Callable[..., Ran]
HOSTILE = ("</script><script>alert(1)</script>", "<!--<script>", "a&lt;b", '"]}', "\u2028\u2029", "]]>", "<img src=x>")


@given(arrays(np.float64, st.tuples(st.integers(0, 4), st.integers(0, 4))))
def test_doubles_come_back_to_the_last_bit(values: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> None:
    packed = doubles(values)
    back = np.frombuffer(base64.b64decode(packed["f64"]), "<f8").reshape(packed["shape"])
    assert back.tobytes() == values.tobytes()


@given(st.lists(st.integers(0, 300).flatmap(lambda n: st.permutations(range(n))), max_size=4))
def test_permutations_are_a_string_of_bits(orders: list[list[int]]) -> None:
    text = permutations([np.array(order, np.intp) for order in orders])
    bits = "".join(f"{byte:08b}" for byte in base64.b64decode(text))
    place = 0
    for order in orders:
        width = len(f"{len(order) - 1:b}") if len(order) > 1 else 0
        for entry in order:
            assert (int(bits[place : place + width], 2) if width else 0) == entry
            place += width
    assert len(bits) - place < 8


@given(
    st.recursive(
        st.text() | st.floats(allow_nan=False, allow_infinity=False), lambda inner: st.lists(inner), max_leaves=4
    )
)
def test_what_is_embedded_is_json_without_a_sign_that_html_knows(value: object) -> None:
    text = embedded({"value": value})
    assert json.loads(text) == {"value": value}
    assert not re.search("[<>&\u2028\u2029]", text)


class Elements(HTMLParser):
    """The elements of a page, and what is in its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [str(value) for name, value in attrs if name in ("src", "href", "action", "style")]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_adds_an_element(name: str) -> None:
    plain, hostile = Elements(), Elements()
    plain.feed(page_html(bare(synthetic_table([("layer", (4, 4))]), "net.mpqt")))
    hostile.feed(page_html(bare(synthetic_table([(name, (4, 4))]), name)))
    assert hostile.tags == plain.tags
    assert [source for source in hostile.sources if source[0] != "#"] == ["data:,"]


def test_the_policy_names_each_script_and_the_style_by_what_it_is() -> None:
    html = bare_html(demo_table())
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    assert "unsafe" not in policy[1]
    assert "default-src 'none'" in policy[1]
    assert "connect-src" not in policy[1]
    scripts = [one.split("</script>")[0] for one in html.split("<script>")[1:]]
    style = html.split("<style>")[1].split("</style>")[0]
    assert len(scripts) == 3
    for inline in (*scripts, style):
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy[1]


def test_a_page_carries_the_licences_of_what_is_in_it() -> None:
    text = page_html(bare(synthetic_table([("a", (4, 4))])))
    assert text.count("Permission to use, copy, modify") == 2


def test_one_script_has_every_name_once() -> None:
    text = script()
    assert not re.search(r"^(import|export)\b", text, re.MULTILINE)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text)
    names = re.findall(r"^(?:async )?(?:function|class|const|let) ([A-Za-z_]\w*)", text, re.MULTILINE)
    assert sorted(names) == sorted(set(names))
    files = {path.name for path in Path("mpq_plugins/report/page/assets").glob("*.js")}
    assert files == {"main.js", *re.findall(r'from "\./([a-z_]+\.js)"', "".join(map(read, files)))}


def read(name: str) -> str:
    return (Path("mpq_plugins/report/page/assets") / name).read_text()


def test_the_same_table_makes_the_same_page() -> None:
    table = synthetic_table(many_layers(3), by_channel=True)
    pages = [page_html(page_of_table(table, "net.mpqt", {}, title="net")) for _ in range(2)]
    assert pages[0] == pages[1]


@pytest.mark.filterwarnings("ignore:group_size")  # that do not divide a layer's inputs are what this is about
def test_what_the_page_counts_is_what_the_library_counts() -> None:
    for scheme, measured in (
        (mpq.Affine(), (2, 3, 8)),
        (mpq.Affine(granularity="per_group", group_size=16), (2, 3, 8)),
        (mpq.Piecewise(breakpoint="gaussian"), (2, 3, 8)),
        (mpq.Minifloat(format="nvfp4"), (4,)),
    ):
        table = mpq.measure(mpq_net(), scheme, measured, skip=["0"] if scheme.name == "minifloat" else [])
        document = Measured(table, "t", "mse").document()
        for bits, width in zip(document["bits"], document["widths"], strict=True):
            for place, layer in enumerate(table.layers):
                if [place, bits] in document["impossible"]:
                    continue
                groups = max(1, layer.channels * document["groups"][place])
                counted = layer.numel * (bits + width["interval"]) + groups * width["group"] + width["layer"]
                assert counted == mpq.Uniform(bits=bits)(table).size().layers[layer.name].total


def mpq_net() -> "torch.nn.Module":
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.Conv2d(16, 8, 3))


@pytest.mark.slow
def test_every_command_makes_its_plan_again(mpq_cli: Mpq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = synthetic_table([("a", (8, 8)), ("b", (16, 8)), ("c", (8, 16))], by_channel=True)
    table.save("t.mpqt")
    page = page_of_table(table, "t.mpqt", {}, title="t")
    pinned = mpq.Budget(average_bits=4, pin=("re:b.*=2",), tie=("{a,c}",), parts=False)(table)
    commands = {point.command: point.plan for point in page.points[::3]}
    commands[plan_command(pinned.allocator, "t.mpqt")] = pinned
    for command, plan in commands.items():
        assert command is not None
        ran = mpq_cli(*shlex.split(command)[1:])
        assert ran.code == 0, (command, ran.err)
        assert mpq.Plan.load("plan.json") == plan, command


@pytest.fixture
def mpq_cli(mpq: Mpq) -> Mpq:
    return mpq


def test_a_command_that_no_shell_takes_apart() -> None:
    record = plan_of(synthetic_table([("a", (4, 4))]), mpq.Uniform(), (), {}).allocator
    assert plan_command(record, "my net's; rm x.mpqt") == (
        "mpq plan 'my net'\"'\"'s; rm x.mpqt' -a uniform -o plan.json"
    )
    assert plan_command(record.model_copy(update={"name": "not-installed"}), "t") is None


def test_series_that_cannot_be_made_say_what_to_measure() -> None:
    table = mpq.measure(mpq_net(), bits=(2, 8))
    plans, left_out = frontier_module.frontier(table)
    assert {plan.series for plan in plans} == {"uniform", "budget per layer", "sqnr"}
    said = dict(line.split(": ", 1) for line in left_out)
    assert said.keys() == {"budget per channel", "mixquant", "ptilmpq"}
    assert "--granularity per_channel" in said["budget per channel"]
    assert "3" in said["mixquant"]


@pytest.mark.parametrize("bits", [(1,), (8,), (7, 8)])
def test_a_table_of_few_widths_has_the_plans_that_it_can_have(bits: tuple[int, ...]) -> None:
    page = page_of_table(mpq.measure(mpq_net(), bits=bits), "t.mpqt", {}, title="t")
    assert {point.row.name for point in page.points} == {"uniform"}
    said = dict(line.split(": ", 1) for line in page.left_out)
    assert all("--bits 1-8" in said[series] for series in ("budget per layer", "sqnr", "mixquant", "ptilmpq"))


def test_plans_of_other_layers_are_refused() -> None:
    one, other = (mpq.Uniform()(synthetic_table([(name, (4, 4))])) for name in ("a", "b"))
    with pytest.raises(SettingError, match=r"other\.json.*'b'"):
        page_of_plans({"one.json": one, "other.json": other}, "t")
    with pytest.raises(SettingError, match=r"other\.json.*net\.mpqt"):
        page_of_table(synthetic_table([("a", (4, 4))]), "net.mpqt", {"other.json": other}, title="t")


def test_a_table_without_layers_is_refused() -> None:
    with pytest.raises(SettingError, match=r"t\.mpqt.*no layers"):
        Measured(synthetic_table([]), "t.mpqt", None).document()


@pytest.mark.parametrize(("shapes", "most"), [(resnet152(), 1_500_000), (llama_7b(), 5_000_000)], ids=["152", "7b"])
def test_a_page_is_small_enough_to_be_sent(shapes: list[tuple[str, tuple[int, ...]]], most: int) -> None:
    points = 40 * len(shapes) * len("[[3,10000],[4,10000]],")  # plans, were all of them to split every layer
    assert len(bare_html(synthetic_table(shapes)).encode()) + points < most


def test_a_page_of_plans_alone_has_sizes_and_predicts_nothing() -> None:
    table = synthetic_table([("a", (8, 4)), ("b", (8, 4))])
    plan = mpq.PTILMPQ(alpha=0.5)(table)
    page: PageDocument = page_of_plans({"p.json": plan}, "p")
    document = page.document()
    assert document["table"] is None
    assert document["chosen"] == 0
    (point,) = document["points"]
    assert point["total_bits"] == plan.size().total_bits == sum(point["sizes"])
    assert point["cost"] is None
    assert sorted(point["layers"]) == [[[3, 4], [4, 4]], [[4, 4], [5, 4]]]


def test_report_refuses_in_one_line_and_writes_nothing(mpq: Mpq, tmp_path: Path) -> None:
    table = tmp_path / "t.mpqt"
    synthetic_table([("a", (4, 4))]).save(table)
    damaged, plan, text = tmp_path / "damaged.mpqt", tmp_path / "p.json", tmp_path / "notes.txt"
    damaged.write_bytes(table.read_bytes()[:-8])
    write_text(text, "nothing\n")
    mpq("plan", table, "--bits", "4", "-a", "uniform", "-o", plan)
    cut = tmp_path / "cut.json"
    cut.write_text(plan.read_text()[:-20])
    out = tmp_path / "page.html"
    for arguments, named in (
        ((damaged,), "damaged.mpqt"),
        ((text,), "notes.txt"),
        ((cut,), "cut.json"),
        ((table, table), "one table"),
        ((tmp_path / "none.mpqt",), "none.mpqt"),
        ((plan, "--eval", "os.path:join"), "evaluation"),
        ((table, "--eval", "os.path:join"), "--model"),
        ((table, "--eval", "nowhere:score"), "nowhere"),
        ((table, "--judge", "kl"), "kl"),
        ((table, "--calibrate", "os.path:join"), "--eval"),
    ):
        ran = mpq("report", *arguments, "-o", out)
        assert (ran.code, ran.out) == (2, ""), (arguments, ran)
        assert ran.err.count("\n") == 1, ran.err
        assert named in ran.err, (arguments, ran.err)
        assert not out.exists()
    out.write_text("somebody else's")
    ran = mpq("report", table, "-o", out)
    assert ran.code == 2
    assert "--force" in ran.err
    assert out.read_text() == "somebody else's"


def test_report_writes_over_its_own_page(mpq: Mpq, tmp_path: Path) -> None:
    table, out = tmp_path / "t.mpqt", tmp_path / "page.html"
    synthetic_table([("a", (4, 4))]).save(table)
    for _ in range(2):
        ran = mpq("report", table, "-o", out)
        assert ran.code == 0, ran.err
        assert str(out) in ran.out


SCORES = """
def score(model):
    return {"sum": float(next(model.parameters()).detach().sum()), "loss": 1.0}


def fails(model):
    raise ValueError("no data\\nat all")
"""


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_scores_and_files_are_on_the_page_where_models_are_evaluated(
    mpq_cli: Mpq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = mpq.measure(conv_net(), mpq.Affine(granularity="per_channel"), bits=(2, 4))
    table.save("t.mpqt")
    Path("scoring.py").write_text(SCORES)
    words = ("report", "t.mpqt", "--model", "tests.helpers.nets:conv_net", "-o", "page.html")
    failed = mpq_cli(*words, "--eval", "scoring.py:fails")
    assert (failed.code, failed.err.splitlines()[-1].count("no data")) == (2, 1)
    assert not Path("page.html").exists()
    ran = mpq_cli(*words, "--eval", "scoring.py:score")
    assert ran.code == 0, ran.err
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', Path("page.html").read_text())
    assert found is not None
    document = json.loads(found[1])
    assert document["points"]
    assert all(point["scores"].keys() == {"sum", "loss"} for point in document["points"])
    assert all(point["file_bytes"] > 0 for point in document["points"])
    own = float(next(conv_net().parameters()).detach().sum())
    assert document["float"]["scores"]["sum"] == pytest.approx(own)
    assert len(document["weights"]) == len(table.layers)
    for weights, layer in zip(document["weights"].values(), table.layers, strict=True):
        assert sum(weights["counts"]) == layer.numel
        assert [len(weights["levels"][bits]) <= 2 ** int(bits) for bits in ("2", "4")] == [True, True]
    other = mpq_cli("report", "t.mpqt", "--model", "mpq_plugins.cli.demo.net:digit_net", "-o", "page.html")
    assert (other.code, other.err.count("\n")) == (2, 1)


def test_other_weights_than_those_measured_are_refused() -> None:
    table = mpq.measure(mpq_net())
    other = mpq_net()
    with torch.no_grad():
        next(other.parameters())[3] += 1
    with pytest.raises(SettingError, match="layer '0' are not those that the table was measured on"):
        distributions(other, table)


def test_levels_are_the_values_that_weights_can_have() -> None:
    table = mpq.measure(mpq_net(), mpq.Affine(), (2, 3))
    found = distributions(mpq_net(), table)
    weight = next(mpq_net().parameters()).detach()
    low, high = weight.min().item(), weight.max().item()
    levels = found[0].levels[2]
    assert levels == pytest.approx(sorted(levels))
    assert len(levels) == 4
    assert np.diff(levels) == pytest.approx([(high - low) / 3] * 3, rel=1e-5)
    assert found[0].channel is None
    counts, _ = np.histogram(weight.numpy(), len(found[0].counts))
    assert list(found[0].counts) == counts.tolist()


@pytest.mark.parametrize("values", [(1.0, 1.0000001), (0.0, 1e-45), (-3.3e38, 3.3e38), (0.5, 0.5)])
def test_weights_that_are_near_or_far_have_a_distribution(values: tuple[float, float]) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([values, values]).repeat(1, 2))  # type: ignore[operator]
    (found,) = distributions(net, synthetic_table([("0", (2, 4))], scheme=mpq.Affine())).values()
    assert sum(found.counts) == 8
    assert (found.counts[0], found.counts[-1]) == (4, 4) or values[0] == values[1]


def test_levels_of_a_channel_have_the_layers_scale() -> None:
    torch.manual_seed(0)
    net, scheme = torch.nn.Linear(32, 5), mpq.Minifloat(format="nvfp4")
    found = distributions(net, mpq.measure(net, scheme, (4,)))[0]
    quantized = fake_quantize(net.weight.detach(), 4, scheme)
    assert found.channel is not None
    assert list(found.levels[4]) == quantized[found.channel].unique().tolist()
    assert 2 < len(found.levels[4]) < len(quantized.unique())
