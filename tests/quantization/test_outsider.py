"""A scheme of another distribution does all that ours do, and a broken one is in nobody's way."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from examples.plugins.scheme import mpq_powers as powers
from mpq_plugins import (
    Affine,
    Budget,
    Capabilities,
    Codebook,
    FormatError,
    LayerTable,
    Needs,
    Piecewise,
    Plan,
    PluginError,
    Scheme,
    SettingError,
    Uniform,
    apply,
    compress,
    decompress,
    legalise,
    make_plan,
    measure,
    verify,
)
from mpq_plugins.common import registry
from mpq_plugins.plans import scheme_names
from mpq_plugins.quantization import quantize
from tests.conftest import Ran
from tests.helpers.distributions import install

CODE = Path(powers.__file__).read_text()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path, where distributions come and go."""
    path = tmp_path / "site"
    path.mkdir()
    monkeypatch.syspath_prepend(path)
    known = (scheme_names.scheme_class, scheme_names._adapter, quantize._quantizer_class)
    modules = set(sys.modules)
    for function in known:
        function.cache_clear()
    yield path
    for function in known:
        function.cache_clear()
    for module in set(sys.modules) - modules:
        if module.startswith("mpq_"):
            del sys.modules[module]


@pytest.fixture
def scheme(site: Path) -> Scheme:
    install(site, "mpq-powers", CODE, {"schemes": {"powers": "Powers"}})
    return scheme_names.scheme_class("powers")()  # type: ignore[no-any-return]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 10), nn.ConvTranspose1d(4, 6, 2)).eval()


def test_it_is_listed_and_answers_what_is_asked(scheme: Scheme) -> None:
    assert isinstance(scheme, Scheme)
    assert scheme_names.scheme_names() == (
        "affine",
        "piecewise",
        "codebook",
        "entropy_coded",
        "ggml",
        "minifloat",
        "powers",
    )
    assert [p.distribution for p in registry.installed() if p.name == "powers"] == ["mpq-powers"]


@pytest.mark.parametrize("settings", [
    {}, {"halve": False}, {"granularity": "per_tensor"}, {"granularity": "per_group", "group_size": 2},
], ids=str)  # fmt: skip
def test_it_is_measured_planned_applied_verified_compressed_and_read_back(
    scheme: Scheme, settings: dict[str, Any], tmp_path: Path
) -> None:
    scheme = type(scheme)(**settings)
    model = net()
    skip = ["0"] if settings.get("granularity") == "per_group" else []
    table = measure(model, bits=(2, 3, 4, 8), scheme=scheme, skip=skip, per_channel=True)
    table.save(tmp_path / "net.mpqt")
    assert LayerTable.load(tmp_path / "net.mpqt").scheme == scheme
    for allocator in (Uniform(bits=3), Budget(average_bits=3.5, bits=(2, 3, 4, 8), parts=False)):
        plan = allocator(table)
        assert {layer.scheme for layer in plan.layers} == {scheme}
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == plan
        quantized = apply(model, plan)
        assert all(check.values <= check.allowed for check in verify(quantized, plan, model))
        for layer in plan.layers:  # the table's error is that of the weights
            before, after = (m.get_submodule(layer.name).get_parameter("weight").double() for m in (model, quantized))
            error = table.error(next(own for own in table.layers if own.name == layer.name), "mse", layer.bits or 0)
            assert (after - before).square().mean().item() == pytest.approx(error, rel=1e-5)
        container = compress(model, plan, tmp_path / "net.mpqz", coding="packed")
        assert container.plan == plan
        for name, tensor in decompress(tmp_path / "net.mpqz").items():
            assert tensor.equal(quantized.state_dict()[name])
        # One scale a group, and b bits a weight.
        size = plan.size()
        assert size.weights_only_bits == sum(layer.numel * (layer.bits or 0) for layer in plan.layers)


def test_parts_differ_in_bits(scheme: Scheme, tmp_path: Path) -> None:
    model = net()
    table = measure(model, bits=(2, 4), scheme=scheme, per_channel=True)
    plan = Budget(average_bits=3.2, bits=(2, 4))(table)
    assert any(layer.parts for layer in plan.layers)
    quantized = apply(model, plan)
    compress(model, plan, tmp_path / "net.mpqz")
    assert all(t.equal(quantized.state_dict()[name]) for name, t in decompress(tmp_path / "net.mpqz").items())


def test_backends_without_it_get_the_affine_scheme(scheme: Scheme) -> None:
    plan = Uniform(bits=4)(measure(net(), bits=(4,), scheme=scheme))
    able = Capabilities(backend="other", bits=(4, 8), kinds=("conv2d", "linear", "conv_transpose1d"))
    legal, changes = legalise(plan, able)
    assert {layer.scheme for layer in legal.layers} == {Affine(granularity="per_channel")}
    assert all("other has no powers scheme" in change.why for change in changes)


def test_the_command_line_takes_it(scheme: Scheme, mpq: Callable[..., Ran], tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "net.pt")
    done = mpq("plan", tmp_path / "net.pt", "--scheme", "powers", "--allocator", "uniform", "--bits", "4", "-o",
               tmp_path / "plan.json")  # fmt: skip
    assert done.code == 0, done.err
    planned = Plan.load(tmp_path / "plan.json")
    assert {layer.scheme for layer in planned.layers} == {scheme}  # its own defaults, not the allocator's
    done = mpq("plan", tmp_path / "net.pt", "--scheme", "powers", "--no-halve", "--allocator", "uniform", "--bits", "4",
               "-o", tmp_path / "steep.json")  # fmt: skip
    assert done.code == 0, done.err
    steep = replace(scheme, halve=False)
    assert {layer.scheme for layer in Plan.load(tmp_path / "steep.json").layers} == {steep}
    assert mpq("apply", tmp_path / "net.pt", tmp_path / "plan.json", "-o", tmp_path / "out.pt").code == 0
    assert "mpq-powers" in mpq("plugins").out


def with_field(declared: str) -> str:
    """The module of a scheme with one more field, or with another in place of its flag."""
    code = CODE.replace("from typing import ClassVar", "from typing import Annotated, Any, ClassVar, Literal")
    assert "    halve: bool = True\n" in code
    return code.replace("    halve: bool = True\n", f"    halve: bool = True\n    {declared}\n")


# Schemes whose fields cannot be options beside those there are -> what is said where one is asked for.
ODD_FIELDS = {
    "a command's option": (with_field("output: int = 3"), "has a field 'output', but --output is the command's own"),
    "a command's parameter": (with_field("scheme_name: str = ''"), "but --scheme is the command's own"),
    "a command's argument": (with_field("source: str = ''"), "but source is the command's own"),
    "--help": (with_field("help: bool = True"), "but --help is the command's own"),
    "a flag's opposite": (with_field("asymmetric: bool = True"), "but --symmetric is another scheme's own"),
    "an opposite of its own": (
        with_field("grow: Annotated[bool, 'grows', 'skip'] = True"), "'grow', but --skip is the command's own",
    ),
    "another type": (with_field("range: float = 0.5"), "'range', but --range takes other values for affine"),
    "other values": (with_field("range: Literal['near', 'far'] = 'far'"), "--range takes other values for affine"),
    "an unknown annotation": (with_field("third: 'Undefined' = True"), "NameError"),
    "a default that cannot be shown": (
        "class Shy(int):\n    def __str__(self): raise ValueError('why')\n    __repr__ = __str__\n"
        + with_field("third: int = Shy(3)"), "why",
    ),
    "needs what no option gives": (with_field("third: dict[str, int]"), "needs 'third', whose type no option can give"),
    "is no dataclass": (CODE.replace("@dataclass(frozen=True, kw_only=True)", ""), "should be a frozen dataclass"),
    "leaves": ("import sys; sys.exit(3)", "SystemExit: 3"),
}  # fmt: skip
# Those whose fields can be, and which fail where they are made.
FAILING = {
    "needs an option": (with_field("third: int"), "third: the powers scheme needs it; give --third"),
    "cannot be made": (CODE.replace("self.check_granularity()", "raise KeyError('why')"), "failed (KeyError: 'why')"),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "net.pt"
    torch.save(net().state_dict(), path)
    return path


@pytest.mark.parametrize("case", [*ODD_FIELDS, *FAILING])
def test_odd_fields_are_refused_where_the_scheme_is_asked_for_and_in_nobodys_way(
    site: Path, mpq: Callable[..., Ran], checkpoint: Path, case: str
) -> None:
    code, said = {**ODD_FIELDS, **FAILING}[case]
    install(site, "mpq-odd", code, {"schemes": {"powers": "Powers"}})
    uniform = ("--allocator", "uniform", "--bits", "4")
    for given in (("measure", "--bits", "4"), ("plan", *uniform), ("plan", "--bits", "2-8"), ("sweep", *uniform)):
        ran = mpq(given[0], checkpoint, *given[1:], "--range", "mse", "--symmetric")
        assert ran.code == 0, ran.err
    assert mpq("plan", "--help").code == 0
    for command in (("measure", "--bits", "4"), ("plan", *uniform)):
        ran = mpq(command[0], checkpoint, *command[1:], "--scheme", "powers")
        assert (ran.code, ran.out) == (2, "")
        assert said in ran.err
        assert "mpq-odd" in ran.err or case == "needs an option"
        assert ran.err.count("\n") == 1
    if case in ODD_FIELDS:  # and so are options that it would have had
        assert said in mpq("measure", checkpoint, "--scheme=powers", "--no-halve").err


def test_a_required_field_is_given_by_its_option(site: Path, mpq: Callable[..., Ran], checkpoint: Path) -> None:
    install(site, "mpq-needs", with_field("third: int"), {"schemes": {"powers": "Powers"}})
    ran = mpq("measure", checkpoint, "--bits", "4", "--scheme", "powers", "--third", "5", "--json")
    assert ran.code == 0, ran.err
    assert "third" in mpq("measure", checkpoint, "--third", "5").err  # means nothing with affine


def test_an_allocators_options_win_over_a_foreign_schemes(
    site: Path, mpq: Callable[..., Ran], checkpoint: Path
) -> None:
    install(site, "mpq-qem", with_field("qem: float = 0.5"), {"schemes": {"powers": "Powers"}})
    assert mpq("plan", checkpoint, "--qem", "3").code == 0
    ran = mpq("plan", checkpoint, "--qem", "3", "--scheme", "powers")
    assert ran.code == 2
    assert "schemes: 'powers' of mpq-qem has a field 'qem', but --qem is the allocator's own" in ran.err
    uniform = ("--scheme", "powers", "-a", "uniform", "--bits", "4")
    assert mpq("plan", checkpoint, *uniform, "--qem", "3").code == 0


def test_the_scheme_that_is_named_goes_before_other_foreign_ones(
    site: Path, mpq: Callable[..., Ran], checkpoint: Path
) -> None:
    for name, field in (("alpha", "third: float = 0.5"), ("omega", "third: int = 3")):
        code = with_field(field).replace('= "powers"', f'= "{name}"')
        install(site, f"mpq-{name}", code, {"schemes": {name: "Powers"}})
    for name, value in (("alpha", "0.25"), ("omega", "7")):
        plan = checkpoint.with_name(f"{name}.json")
        ran = mpq("plan", checkpoint, "-a", "uniform", "--scheme", name, "--third", value, "-o", plan)
        assert ran.code == 0, ran.err
        assert f'"third": {value},' in plan.read_text() or f'"third": {value}}}' in plan.read_text()


def test_a_scheme_without_fields_for_its_granularity_takes_none(
    site: Path, mpq: Callable[..., Ran], checkpoint: Path
) -> None:
    code = CODE.replace("granularity: str =", "granularity: ClassVar[str] =")
    code = code.replace("group_size: int | None =", "group_size: ClassVar[None] =")
    install(site, "mpq-fixed", code, {"schemes": {"powers": "Powers"}})
    assert mpq("measure", checkpoint, "--bits", "4", "--scheme", "powers").code == 0
    ran = mpq("measure", checkpoint, "--bits", "4", "--scheme", "powers", "--granularity", "per_tensor")
    assert ran.code == 2
    assert "granularity: means nothing with the powers scheme; leave it out, or add --scheme affine" in ran.err


def test_settings_in_files_are_checked(scheme: Scheme, tmp_path: Path) -> None:
    plan = Uniform(bits=4)(measure(net(), bits=(4,), scheme=scheme))
    for change, said in (
        ({"halve": "yes"}, "halve"), ({"granularity": "per_row"}, "granularity: 'per_row' is not allowed"),
        ({"thirds": 1}, "thirds"),
    ):  # fmt: skip
        document = plan.document()
        document["layers"][0]["scheme"].update(change)
        with pytest.raises(FormatError, match=rf"layers\[0\].*{said}"):
            Plan.from_document(document, "plan.json")


def test_without_its_distribution_the_name_is_unknown_and_those_installed_are_listed(
    scheme: Scheme, site: Path, tmp_path: Path
) -> None:
    table = measure(net(), bits=(4,), scheme=scheme)
    plan = Uniform(bits=4)(table)
    plan.save(tmp_path / "plan.json")
    table.save(tmp_path / "net.mpqt")
    (site / "mpq_powers-1.0.dist-info" / "entry_points.txt").write_text("")
    scheme_names.scheme_class.cache_clear()
    for load, path in ((Plan.load, tmp_path / "plan.json"), (LayerTable.load, tmp_path / "net.mpqt")):
        with pytest.raises(
            FormatError,
            match=r"scheme.* is not allowed; a scheme named affine, piecewise, codebook, entropy_coded, ggml or",
        ):
            load(path)
    with pytest.raises(
        SettingError, match="a scheme named affine, piecewise, codebook, entropy_coded, ggml or minifloat"
    ):
        table.save(tmp_path / "again.mpqt")  # which nobody could read
    with pytest.raises(
        PluginError, match="'powers' is not installed; there are affine, codebook, entropy_coded, ggml, minifloat, p"
    ):
        scheme_names.scheme_class("powers")


BROKEN = {
    "does not load": (
        "raise ValueError('why')",
        "Powers",
        "cannot be imported from mpq_broken:Powers .ValueError: why",
    ),
    "is not there": ("", "Powers", "cannot be imported from mpq_broken:Powers"),
    "lacks methods": ("class Powers: name = 'broken'; quantizer = 'a:b'", "Powers", "lacks granularity, .*check_bits"),
    "is of another name": (CODE, "Powers", "name is 'broken'"),
    "is no class": ("from mpq_plugins import Affine\nPowers = Affine()", "Powers", "name is 'broken'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_scheme_is_named_with_its_distribution_and_others_go_on(
    scheme: Scheme, site: Path, tmp_path: Path, case: str
) -> None:
    code, what, said = BROKEN[case]
    install(site, "mpq-broken", code, {"schemes": {"broken": what}})
    document = Uniform(bits=4)(measure(net(), bits=(4,), scheme=scheme)).document()
    document["layers"][0]["scheme"] = {"name": "broken"}
    with pytest.raises(PluginError, match=f"schemes: 'broken' of mpq-broken.*{said}") as error:
        Plan.from_document(document, "plan.json")
    assert "\n" not in str(error.value)
    other = net()
    for working in (scheme, Affine()):
        assert verify(apply(other, plan := Uniform(bits=4)(measure(other, bits=(4,), scheme=working))), plan, other)


QUANTIZERS = {
    "does not load": ("mpq_absent:Quantizer", "cannot be imported from mpq_absent:Quantizer"),
    "lacks methods": ("builtins:dict", "lacks grids, fake_quantize, encode, decode, zeros"),
}


@pytest.mark.parametrize("case", QUANTIZERS)
def test_a_broken_quantizer_is_named_when_a_weight_is_quantized(site: Path, case: str) -> None:
    target, said = QUANTIZERS[case]
    code = CODE.replace('f"{__name__}:PowersQuantizer"', repr(target))
    install(site, "mpq-half", code, {"schemes": {"powers": "Powers"}})
    half = scheme_names.scheme_class("powers")()
    with pytest.raises(PluginError, match=f"schemes: 'powers' of mpq-half.*{said}"):
        measure(net(), bits=(4,), scheme=half)
    assert measure(net(), bits=(4,)).layers


def test_tables_of_another_shape_than_the_scheme_counts_are_refused(site: Path) -> None:
    code = CODE.replace("rows.abs().amax(1, keepdim=True)", "rows.abs().amax(1)")
    install(site, "mpq-shape", code, {"schemes": {"powers": "Powers"}})
    with pytest.raises(PluginError, match=r"'powers', PowersQuantizer.fit gave tables \[8\] at 4 bits; \(8, 1\)"):
        measure(net(), bits=(4,), scheme=scheme_names.scheme_class("powers")())


@pytest.mark.parametrize("ours", [Affine(), Piecewise(), Codebook()], ids=lambda scheme: scheme.name)
def test_a_name_of_ours_that_another_declares_too_stays_ours(
    site: Path, mpq: Callable[..., Ran], tmp_path: Path, ours: Scheme
) -> None:
    install(site, "mpq-taker", "class Taken: ...", {"schemes": {ours.name: "Taken"}})
    model = net()
    plan = Uniform(bits=4)(measure(model, bits=(4,), scheme=ours))
    assert verify(apply(model, plan), plan, model)
    assert scheme_names.scheme_class(ours.name) is type(ours)
    torch.save(model.state_dict(), tmp_path / "net.pt")
    done = mpq("measure", tmp_path / "net.pt", "--scheme", ours.name, "--bits", "4")
    assert done.code == 0, done.err


@dataclass(frozen=True)
class Under:
    """An allocator of which a scheme is a setting, and schemes in lists are."""

    scheme: Scheme
    others: tuple[Scheme, ...] = ()
    name: ClassVar[str] = "under"

    @property
    def needs(self) -> Needs:
        return Needs((4,), scheme=self.scheme)

    def __call__(self, table: LayerTable) -> Plan:
        return make_plan(table, self, {layer.name: 4 for layer in table.layers})


def test_a_scheme_among_an_allocators_settings_is_recorded_with_its_name(scheme: Scheme, tmp_path: Path) -> None:
    table = measure(net(), bits=(4,), scheme=scheme)
    for each in (scheme, Affine(), Piecewise(), Codebook()):
        plan = Under(each, (each,))(table)
        recorded = plan.allocator.parameters["scheme"]
        assert next(iter(recorded)) == "name"
        assert recorded == {"name": each.name, **asdict(each)}
        assert plan.allocator.parameters["others"] == [recorded]
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json").allocator == plan.allocator


def test_a_name_with_two_owners_is_an_error_naming_both_and_others_go_on(scheme: Scheme, site: Path) -> None:
    for distribution in ("mpq-one", "mpq-two"):
        install(site, distribution, CODE, {"schemes": {"twice": "Powers"}})
    plan = Uniform(bits=4)(measure(net(), bits=(4,), scheme=scheme))
    document = plan.document()
    assert Plan.from_document(json.loads(json.dumps(document)), "plan.json") == plan
    document["layers"][0]["scheme"]["name"] = "twice"
    with pytest.raises(PluginError, match=r"'twice' is declared by both mpq-(one|two).* and mpq-(one|two)"):
        Plan.from_document(document, "plan.json")
