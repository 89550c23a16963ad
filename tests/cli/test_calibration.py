"""`mpq apply --calibrate` and `mpq measure --sensitivity`: the library's own numbers, and one line for what is not."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from mpq_plugins import (
    Affine,
    LayerTable,
    Part,
    Plan,
    Uniform,
    apply,
    compensate,
    measure,
    reconstruct,
    round_weights,
    sensitivity,
    synthetic_batches,
    verify,
)
from mpq_plugins.reconstruction import apply as apply_module
from mpq_plugins.reconstruction.rounding import Rounding
from tests.conftest import Ran
from tests.helpers import nets
from tests.helpers.plans import with_layer

pytestmark = pytest.mark.usefixtures("one_thread")

Mpq = Callable[..., Ran]
Words = list[str]

ME = "tests.cli.test_calibration"
PER_CHANNEL = Affine(granularity="per_channel")
IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(2)) + 0.3


def net() -> nets.ConvNet:
    """What the checkpoint holds, as a factory makes it: with other weights, in training mode."""
    torch.manual_seed(9)
    return nets.ConvNet()


def batches() -> list[Tensor]:
    return list(IMAGES.split(8))


def generated() -> Iterator[Tensor]:
    yield from batches()


def none_at_all() -> list[Tensor]:
    return []


def single() -> Tensor:
    return IMAGES


def wrong_shape() -> list[Tensor]:
    return [torch.zeros(2, 5, 8, 8)]


def broken() -> list[Tensor]:
    raise KeyError("data/train")


def not_numbers() -> list[Tensor]:
    return [IMAGES * float("nan")]


def bare() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4, bias=False))


def rows() -> list[Tensor]:
    return [torch.ones(2, 8)]


def other_net() -> nn.Module:
    return nets.tied_net()


def wider_net() -> nn.Module:
    wide = nets.ConvNet()
    wide.fc = nn.Linear(6, 11)
    return wide


class Embeds(nn.Module):
    """A model without logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nets.conv_net()

    def forward(self, x: Tensor) -> Mapping[str, Tensor]:
        return {"embedding": self.body(x)}


def embeds() -> nn.Module:
    return Embeds()


def embedding(model: nn.Module, batch: Tensor) -> Tensor:
    found: Tensor = model(batch)["embedding"]
    return found


NAMES = [ME + ":" + function.__name__ for function in (net, batches)]


@pytest.fixture(params=["safetensors", "pt"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A small checkpoint file."""
    path = tmp_path / f"net.{request.param}"
    if request.param == "pt":
        torch.save(nets.conv_net().state_dict(), path)
    else:
        save_model(nets.conv_net(), str(path))
    return path


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    """A plan for it, without the transposed convolution, whose channels a file does not tell."""
    path = tmp_path / "plan.json"
    Uniform(bits=2)(measure(nets.conv_net(), PER_CHANNEL, (2,), skip=["up"])).save(path)
    return path


def state_in(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return found


# ---- mpq apply


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning by 3 steps a block, in place of the 20,000 of the default."""
    monkeypatch.setattr(
        apply_module,
        "reconstruct",
        lambda model, plan, batches, progress: reconstruct(model, plan, batches, steps=3, progress=progress),
    )


HOW: list[tuple[list[str], Rounding]] = [
    ([], "compensated"),
    (["--rounding", "compensated"], "compensated"),
    (["--rounding", "nearest"], "nearest"),
    (["--rounding", "learned"], "learned"),
]


def same_state(written: Mapping[str, Tensor], expected: nn.Module) -> bool:
    state = expected.state_dict()
    return written.keys() == state.keys() and all(value.equal(state[name]) for name, value in written.items())


def outputs(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(batch)
    return found


@pytest.mark.parametrize("function", ["batches", "generated"])
@pytest.mark.parametrize(("words", "rounding"), HOW)
def test_a_calibrated_checkpoint_is_what_the_library_makes(
    mpq: Mpq, checkpoint: Path, plan_file: Path, tmp_path: Path, function: str, words: Words, rounding: Rounding
) -> None:
    before = checkpoint.read_bytes()
    out = tmp_path / f"out{checkpoint.suffix}"
    ran = mpq("apply", checkpoint, plan_file, "--model", NAMES[0], "--calibrate", f"{ME}:{function}", *words, "-o", out)
    assert ran.code == 0, ran.err
    assert checkpoint.read_bytes() == before
    plan = Plan.load(plan_file)
    expected = apply(nets.conv_net(), plan, calibrate=batches(), rounding=rounding)
    written = state_in(out)
    assert same_state(written, expected)
    loaded = net()
    loaded.load_state_dict(written)
    assert outputs(loaded, IMAGES).equal(outputs(expected, IMAGES))
    verify(loaded, plan, original=round_weights(nets.conv_net(), plan, batches(), rounding))
    corrects = rounding != "learned"
    assert ("5 biases and statistics corrected" in ran.out) == corrects
    assert written["bn1.running_mean"].equal(nets.conv_net().state_dict()["bn1.running_mean"]) != corrects


@pytest.mark.parametrize(("words", "rounding"), HOW[:3])
def test_what_was_corrected_is_listed(
    mpq: Mpq, checkpoint: Path, plan_file: Path, tmp_path: Path, words: Words, rounding: Rounding
) -> None:
    out = tmp_path / f"out{checkpoint.suffix}"
    calibrated = ("--model", NAMES[0], "--calibrate", NAMES[1], *words)
    ran = mpq("apply", checkpoint, plan_file, *calibrated, "-o", out, "--json")
    label = {"nearest": "nearest, corrected"}.get(rounding, rounding)
    assert json.loads(ran.out) == {
        "checkpoint": str(out),
        "layers": 3,
        "as": {"fake-quantized": 3},
        "rounding": label,
        "corrected": [
            "bn1.running_mean", "bn1.running_var", "bn2.running_mean", "bn2.running_var", "fc.bias",
        ],
    }  # fmt: skip
    told = mpq("apply", checkpoint, plan_file, *calibrated, "-o", out, "--force")
    assert f"3 layers fake-quantized ({label}), 5 biases and statistics corrected, all else as it was" in told.out
    plain = mpq("apply", checkpoint, plan_file, "-o", out, "--force")
    assert plain.out.strip().endswith("3 layers fake-quantized (nearest), everything else as it was")


@pytest.mark.parametrize(("words", "rounding"), HOW[:3])
@pytest.mark.parametrize("prefix", ["module.", "model."])
def test_a_checkpoint_with_a_prefix_and_more_in_it_keeps_both(
    mpq: Mpq, plan_file: Path, tmp_path: Path, prefix: str, words: Words, rounding: Rounding
) -> None:
    state = {f"{prefix}{name}": value for name, value in nets.conv_net().state_dict().items()}
    torch.save({"state_dict": state, "epoch": 7}, tmp_path / "net.pt")
    out = tmp_path / "out.pt"
    ran = mpq("apply", tmp_path / "net.pt", plan_file, "--model", NAMES[0], "--calibrate", NAMES[1], *words, "-o", out)
    assert ran.code == 0, ran.err
    content = torch.load(out, weights_only=True)
    expected = apply(nets.conv_net(), Plan.load(plan_file), calibrate=batches(), rounding=rounding)
    assert content["epoch"] == 7
    assert same_state({name.removeprefix(prefix): value for name, value in content["state_dict"].items()}, expected)


def test_half_precision_checkpoints_stay_so(mpq: Mpq, plan_file: Path, tmp_path: Path) -> None:
    half = nets.conv_net().to(torch.bfloat16)
    state = half.state_dict()
    save_file(state, tmp_path / "net.safetensors")
    out = tmp_path / "out.safetensors"
    ran = mpq("apply", tmp_path / "net.safetensors", plan_file, "--model", NAMES[0], "--calibrate", NAMES[1], "-o", out)
    assert ran.code == 0, ran.err
    written = load_file(out)
    assert {name: value.dtype for name, value in written.items()} == {n: value.dtype for n, value in state.items()}
    assert not written["bn1.running_mean"].equal(state["bn1.running_mean"])
    # The factory's model is in float32, where its weights are rounded; the file has what bfloat16 makes of that.
    expected = apply(half.float(), Plan.load(plan_file), calibrate=batches()).state_dict()
    assert all(value.equal(expected[name].to(value.dtype)) for name, value in written.items())


class Tied(nn.Module):
    """An embedding and the output layer share a weight, and two layers another; all have biases to correct."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.lm_head = nn.Linear(8, 20)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.two(torch.relu(self.one(self.embed(tokens)))))
        return logits


def tied() -> nn.Module:
    torch.manual_seed(3)
    return Tied().eval()


def tokens() -> list[Tensor]:
    return [torch.arange(20).reshape(4, 5), torch.arange(20).flip(0).reshape(4, 5)]


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(("words", "rounding"), HOW[1:])
def test_tied_weights_are_rounded_once(
    mpq: Mpq, tmp_path: Path, suffix: str, prefix: str, words: Words, rounding: Rounding
) -> None:
    state = {f"{prefix}{name}": value for name, value in tied().state_dict().items()}
    source, out = tmp_path / f"net.{suffix}", tmp_path / f"out.{suffix}"
    if suffix == "pt":
        torch.save(state, source)
    else:  # which holds a shared tensor under one name alone
        save_file({n: v for n, v in state.items() if "lm_head.weight" not in n and "two.weight" not in n}, source)
    plan = Uniform(bits=3)(measure(tied(), PER_CHANNEL, (3,)))
    plan.save(tmp_path / "plan.json")
    words = ["--model", f"{ME}:tied", "--calibrate", f"{ME}:tokens", *words, "-o", str(out)]
    ran = mpq("apply", source, tmp_path / "plan.json", *words)
    assert ran.code == 0, ran.err
    expected = apply(tied(), plan, calibrate=tokens(), rounding=rounding)
    written = {name.removeprefix(prefix): value for name, value in state_in(out).items()}
    assert written.keys() == {name.removeprefix(prefix) for name in state_in(source)}
    loaded = tied()
    loaded.load_state_dict(written, strict=suffix == "pt")
    assert same_state(loaded.state_dict(), expected)
    assert outputs(loaded, tokens()[0]).equal(outputs(expected, tokens()[0]))
    if suffix == "pt":  # still one tensor in the file
        kept = torch.load(out, weights_only=True)
        assert kept[f"{prefix}embed.weight"].data_ptr() == kept[f"{prefix}lm_head.weight"].data_ptr()


@pytest.mark.parametrize(("words", "rounding"), HOW[1:3])
def test_parts_and_layers_at_16_bits_are_what_the_library_makes(
    mpq: Mpq, checkpoint: Path, tmp_path: Path, words: Words, rounding: Rounding
) -> None:
    plan = Uniform(bits=2)(measure(nets.conv_net(), PER_CHANNEL, (2,), skip=["up"]))
    parts = (Part(bits=1, channels=(0, 3)), Part(bits=4, channels=(1, 2, 4, 5)), Part(bits=16, channels=(6, 7)))
    plan = with_layer(with_layer(plan, "conv1", bits=None, parts=parts), "fc", bits=16)
    plan.save(tmp_path / "parts.json")
    out = tmp_path / f"out{checkpoint.suffix}"
    words = ["--model", NAMES[0], "--calibrate", NAMES[1], *words, "-o", str(out)]
    assert mpq("apply", checkpoint, tmp_path / "parts.json", *words).code == 0
    written = state_in(out)
    assert written["fc.weight"].dtype == torch.float16
    expected = apply(nets.conv_net(), plan, calibrate=batches(), rounding=rounding)
    assert same_state({name: value.to(expected.state_dict()[name].dtype) for name, value in written.items()}, expected)


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
@pytest.mark.parametrize("checkpoint", ["safetensors"], indirect=True)
def test_inputs_made_of_the_statistics_do_as_well(
    mpq: Mpq, checkpoint: Path, plan_file: Path, tmp_path: Path, rounding: Rounding
) -> None:
    out = tmp_path / "out.safetensors"
    words = ("--model", NAMES[0], "--synthetic", "8,3,8,8", "--rounding", rounding, "-o", out)
    ran = mpq("apply", checkpoint, plan_file, *words)
    assert ran.code == 0, ran.err
    made = list(synthetic_batches(nets.conv_net(), (8, 3, 8, 8)))
    assert same_state(state_in(out), apply(nets.conv_net(), Plan.load(plan_file), calibrate=made, rounding=rounding))


BAD_APPLIES: list[tuple[Words, str]] = [
    (["--calibrate", NAMES[1]], "calibration runs the checkpoint's model"),
    (["--model", f"{ME}:other_net"], "name its own model"),
    (["--model", NAMES[0], "--calibrate", "batches"], "batches: names no function; write package.module:function"),
    (["--model", NAMES[0], "--calibrate", f"{ME}:missing"], ":missing: the function cannot be found"),
    (["--model", NAMES[0], "--calibrate", "no.such.module:f"], "no.such.module:f: the function cannot be found"),
    (["--model", NAMES[0], "--calibrate", f"{ME}:NAMES"], ":NAMES: is a list; a function is needed"),
    (["--model", NAMES[0], "--calibrate", f"{ME}:broken"], ":broken: the function cannot be called (KeyError"),
    (["--model", NAMES[0], "--calibrate", f"{ME}:none_at_all"], ":none_at_all: none given"),
    (["--model", NAMES[0], "--calibrate", f"{ME}:single"], ":single: a single tensor is one batch"),
    (["--model", NAMES[0], "--calibrate", f"{ME}:net"], ":net: ConvNet is no series of inputs"),
    (["--model", NAMES[0], "--calibrate", f"{ME}:wrong_shape"], "batches: ConvNet does not run on a batch"),
    (
        ["--model", NAMES[0], "--calibrate", f"{ME}:not_numbers", "--rounding", "nearest"],
        "NaN or infinite; look at the inputs",
    ),
    (
        ["--model", NAMES[0], "--calibrate", NAMES[1], "--synthetic", "4,3,8,8"],
        "both say what to calibrate on; give one",
    ),
    (["--model", NAMES[0], "--rounding", "compensated"], "rounding: 'compensated' needs calibration inputs"),
    (
        ["--rounding", "learnt"],
        "rounding: 'learnt' is not allowed; nearest, compensated, learned. Did you mean learned",
    ),
    (["--model", NAMES[1], "--calibrate", NAMES[1]], ":batches: returned a list; a torch.nn.Module is needed"),
    (["--model", f"{ME}:other_net", "--calibrate", NAMES[1]], "name the checkpoint's own model"),
    (["--model", f"{ME}:wider_net", "--calibrate", NAMES[1]], ":wider_net: does not take"),
]


def refused(ran: Ran, message: str) -> None:
    assert ran.code == 2
    assert ran.out == ""
    last = ran.err.splitlines()[-1]
    assert last.startswith("mpq: error: ")
    assert message in last
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(("words", "message"), BAD_APPLIES, ids=range(len(BAD_APPLIES)))
@pytest.mark.parametrize("checkpoint", ["safetensors"], indirect=True)
def test_bad_words_are_one_line_and_no_file(
    mpq: Mpq, checkpoint: Path, plan_file: Path, tmp_path: Path, words: Words, message: str
) -> None:
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    refused(mpq("apply", checkpoint, plan_file, "-o", tmp_path / "out.safetensors", *words), message)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_correction_that_the_checkpoint_has_no_place_for_is_refused(mpq: Mpq, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = bare()
    save_model(model, str(tmp_path / "net.safetensors"))
    Uniform(bits=2)(measure(model, PER_CHANNEL, (2,))).save(tmp_path / "plan.json")
    words = ("apply", tmp_path / "net.safetensors", tmp_path / "plan.json", "-o", tmp_path / "out.safetensors")
    on_inputs = (*words, "--model", f"{ME}:bare", "--calibrate", f"{ME}:rows")
    ran = mpq(*on_inputs, "--rounding", "nearest")
    refused(ran, "calibrate: '0.bias' would be new")
    assert "apply(model, plan, calibrate=batches)" in ran.err
    assert not (tmp_path / "out.safetensors").exists()
    assert mpq(*on_inputs).code == 0  # compensated weights do without
    made = compensate(model, Plan.load(tmp_path / "plan.json"), rows(), new_biases=False)
    written = load_file(tmp_path / "out.safetensors")
    assert written.keys() == model.state_dict().keys()
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in written.items())


def with_biases() -> nn.Module:
    """Where folding BatchNorm in leaves no layer without a bias of its own."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).eval()


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_a_folded_norm_that_the_checkpoint_has_is_refused(mpq: Mpq, tmp_path: Path, rounding: str) -> None:
    save_model(with_biases(), str(tmp_path / "net.safetensors"))
    Uniform(bits=2)(measure(with_biases(), bits=(2,), fold_bn=True)).save(tmp_path / "plan.json")
    words = ("--model", f"{ME}:with_biases", "--calibrate", NAMES[1], "--rounding", rounding)
    out = tmp_path / "out.safetensors"
    ran = mpq("apply", tmp_path / "net.safetensors", tmp_path / "plan.json", *words, "-o", out)
    refused(ran, "would be gone, for the plan folds BatchNorm in")
    assert not out.exists()


def test_learned_ranges_of_inputs_are_refused(mpq: Mpq, tmp_path: Path) -> None:
    save_model(with_biases(), str(tmp_path / "net.safetensors"))
    plan = Uniform(bits=2)(measure(with_biases(), PER_CHANNEL, (2,)))
    plan.with_activation_bits(8).save(tmp_path / "plan.json")
    words = ("--model", f"{ME}:with_biases", "--calibrate", NAMES[1], "--rounding", "learned")
    ran = mpq("apply", tmp_path / "net.safetensors", tmp_path / "plan.json", *words, "-o", tmp_path / "out.safetensors")
    refused(ran, "learning adds the ranges of inputs, which `mpq reconstruct` writes")


@pytest.mark.parametrize("checkpoint", ["safetensors"], indirect=True)
def test_a_plan_that_no_file_can_take_is_refused_calibrated_too(mpq: Mpq, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    words = ("--model", NAMES[0], "--calibrate", NAMES[1], "-o", out)
    Uniform(bits=2)(measure(nets.conv_net(), bits=(2,))).save(tmp_path / "folded.json")
    assert mpq("apply", checkpoint, tmp_path / "folded.json", *words).code == 2
    Uniform(bits=2)(measure(nets.tied_net(), bits=(2,))).save(tmp_path / "other.json")
    refused(mpq("apply", checkpoint, tmp_path / "other.json", *words), "the plan was made for another model")
    assert not out.exists()


# ---- mpq measure


CONV_NET = "tests.helpers.nets:conv_net"
SCHEME = ("--granularity", "per_channel", "--range", "minmax", "--bits", "2,4")


def test_sensitivities_are_the_librarys_and_are_kept(mpq: Mpq, tmp_path: Path) -> None:
    out = tmp_path / "net.mpqt"
    kinds = ("kl", "output_mse")
    words = [word for kind in kinds for word in ("--sensitivity", kind)]
    ran = mpq("measure", CONV_NET, *SCHEME, *words, "--calibrate", NAMES[1], "-o", out, "--json")
    assert ran.code == 0, ran.err
    expected = measure(nets.conv_net(), PER_CHANNEL, (2, 4))
    for kind in kinds:
        expected = sensitivity(nets.conv_net(), expected, kind, batches())
    table = LayerTable.load(out)
    assert table.sensitivities == kinds
    assert table.channel_sensitivities == ("output_mse",)
    printed = json.loads(ran.out)["layers"]
    for ours, theirs in zip(table.layers, expected.layers, strict=True):
        for kind in kinds:
            assert ours.sensitivities[kind].tolist() == theirs.sensitivities[kind].tolist()
            assert printed[ours.name]["sensitivities"][kind] == theirs.sensitivities[kind].tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["net.mpqt"]


def test_sensitivities_need_no_file(mpq: Mpq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(root)
    monkeypatch.chdir(tmp_path)
    ran = mpq("measure", CONV_NET, *SCHEME, "--sensitivity", "kl", "--calibrate", NAMES[1])
    assert ran.code == 0, ran.err
    assert "not saved" in ran.out
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_logits_is_measured_by_its_output_function(mpq: Mpq, tmp_path: Path) -> None:
    out = tmp_path / "net.mpqt"
    words = ("--sensitivity", "distance", "--calibrate", NAMES[1], "--output-of", f"{ME}:embedding")
    ran = mpq("measure", f"{ME}:embeds", *SCHEME, *words, "-o", out)
    assert ran.code == 0, ran.err
    plain = sensitivity(nets.conv_net(), measure(nets.conv_net(), PER_CHANNEL, (2, 4)), "distance", batches())
    for ours, theirs in zip(LayerTable.load(out).layers, plain.layers, strict=True):
        assert ours.name == f"body.{theirs.name}"
        assert ours.sensitivities["distance"].tolist() == theirs.sensitivities["distance"].tolist()


FAILS: list[int] = []


def fails_once(model: nn.Module, batch: Tensor) -> Tensor:
    FAILS.append(1)
    if len(FAILS) == 20:
        raise RuntimeError("out of memory")
    found: Tensor = model(batch)
    return found


def test_an_interrupted_measurement_goes_on_beside_its_output(mpq: Mpq, tmp_path: Path) -> None:
    FAILS.clear()
    words: list[Any] = ["measure", CONV_NET, *SCHEME, "--sensitivity", "kl", "--calibrate", NAMES[1]]
    words += ["--output-of", f"{ME}:fails_once", "-o", tmp_path / "net.mpqt"]
    refused(mpq(*words), "output: the function failed (RuntimeError: out of memory)")
    # The errors stay too until the table is written.
    assert {path.name for path in tmp_path.iterdir()} == {"net.mpqt.partial"}
    whole = 3 * (1 + 4 * 2)
    ran = mpq(*words)
    assert ran.code == 0, ran.err
    assert len(FAILS) - 20 < whole
    assert [path.name for path in tmp_path.iterdir()] == ["net.mpqt"]
    plain = sensitivity(nets.conv_net(), measure(nets.conv_net(), PER_CHANNEL, (2, 4)), "kl", batches())
    for ours, theirs in zip(LayerTable.load(tmp_path / "net.mpqt").layers, plain.layers, strict=True):
        assert ours.sensitivities["kl"].tolist() == theirs.sensitivities["kl"].tolist()


BAD_MEASURES: list[tuple[str, Words, str]] = [
    (CONV_NET, ["--sensitivity", "kl"], "--sensitivity needs inputs"),
    (CONV_NET, ["--calibrate", NAMES[1]], "--calibrate is for --sensitivity or --activations"),
    (CONV_NET, ["--sensitivity", "kll", "--calibrate", NAMES[1]], "sensitivities: 'kll' is not installed; there are"),
    (CONV_NET, ["--sensitivity", "kl", "--calibrate", f"{ME}:broken"], ":broken: the function cannot be called"),
    (CONV_NET, ["--sensitivity", "kl", "--calibrate", f"{ME}:wrong_shape"], "ConvNet does not run on a batch"),
    (CONV_NET, ["--sensitivity", "kl", "--calibrate", f"{ME}:not_numbers"], "its kl is NaN or infinite"),
    (f"{ME}:embeds", ["--sensitivity", "kl", "--calibrate", NAMES[1]], "output: Embeds gives a dict"),
    (
        f"{ME}:embeds", ["--sensitivity", "distance", "--calibrate", NAMES[1], "--output-of", f"{ME}:missing"],
        ":missing: the function cannot be found",
    ),
    (
        f"{ME}:embeds", ["--sensitivity", "distance", "--calibrate", NAMES[1], "--output-of", f"{ME}:net"],
        "output: the function failed (TypeError",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("source", "words", "message"), BAD_MEASURES, ids=range(len(BAD_MEASURES)))
def test_a_measurement_that_cannot_be_is_one_line_and_no_file(
    mpq: Mpq, tmp_path: Path, source: str, words: Words, message: str
) -> None:
    refused(mpq("measure", source, *SCHEME, *words, "-o", tmp_path / "net.mpqt"), message)
    assert not (tmp_path / "net.mpqt").exists()


@pytest.mark.parametrize("checkpoint", ["safetensors"], indirect=True)
def test_a_file_cannot_be_run(mpq: Mpq, checkpoint: Path, tmp_path: Path) -> None:
    ran = mpq("measure", checkpoint, "--sensitivity", "kl", "--calibrate", NAMES[1], "-o", tmp_path / "net.mpqt")
    refused(ran, "is a file, and only a module can be run: package.module:factory")
    assert not (tmp_path / "net.mpqt").exists()
