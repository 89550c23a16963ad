"""`mpq compress`, `decompress` and `inspect`: the library's own result, and one line for what is refused."""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mpq_plugins as mpq_library
from mpq_plugins import Affine, Codebook, Container, Plan, Sparsity, Uniform, finish, measure, prune
from mpq_plugins.plans.scheme import Scheme
from tests.conftest import Ran
from tests.helpers.nets import conv_net

Mpq = Callable[..., Ran]

ME = "tests.cli.test_compress"


def factory() -> nn.Module:
    """A network for the command line."""
    return conv_net()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint and a plan for it."""
    save_file(conv_net().state_dict(), tmp_path / "net.safetensors")
    planned(tmp_path / "net.safetensors").save(tmp_path / "plan.json")
    return tmp_path


def planned(source: "Path | nn.Module", scheme: "Scheme | None" = None, bits: int = 4) -> Plan:
    return Uniform(bits=bits)(measure(source, scheme or Affine(), bits=(bits,), fold_bn=False))


def expected(plan: Plan, net: "nn.Module | None" = None) -> dict[str, Tensor]:
    return mpq_library.apply(net or conv_net(), plan).state_dict()


def test_there_and_back(mpq: Mpq, folder: Path) -> None:
    made = mpq("compress", folder / "net.safetensors", folder / "plan.json", "-o", folder / "net.mpq")
    assert made.code == 0, made.err
    assert made.out.endswith(f"wrote {folder / 'net.mpq'}\n")
    assert "their plan promised" in " ".join(made.out.split())
    back = mpq("decompress", folder / "net.mpq", "-o", folder / "back.safetensors")
    assert back.code == 0
    assert back.out == f"wrote {folder / 'back.safetensors'}: {len(conv_net().state_dict())} tensors\n"
    plan = Plan.load(folder / "plan.json")
    found = load_file(folder / "back.safetensors")
    assert found.keys() == expected(plan).keys()
    assert all(found[name].equal(tensor) for name, tensor in expected(plan).items())
    assert mpq("check", folder / "plan.json", folder / "back.safetensors").code == 0


def test_inspect_shows_every_layer_and_gives_the_plan_back(mpq: Mpq, folder: Path) -> None:
    mpq("compress", folder / "net.safetensors", folder / "plan.json", "-o", folder / "net.mpq", "--prune", "0.75")
    shown = mpq("inspect", folder / "net.mpq", "--plan", folder / "again.json")
    assert shown.code == 0
    for word in ("conv1", "conv2", "up", "fc", "all", "pruned by Sparsity(share=0.75)", "75.0%", "Huffman", "in total"):
        assert word in shown.out
    assert (folder / "again.json").read_bytes() == (folder / "plan.json").read_bytes()
    document = json.loads(mpq("inspect", folder / "net.mpq", "--json").out)
    assert document["bytes"] == (folder / "net.mpq").stat().st_size
    layers = document["layers"]
    assert sorted(layers) == ["conv1", "conv2", "fc", "up"]
    assert document["all"]["stored"] == sum(layer["stored"] for layer in layers.values())
    around = document["other_tensors_bytes"] + document["plan_and_header_bytes"]
    assert document["all"]["stored"] + around == document["bytes"]
    assert layers["conv1"]["sparsity"] == 0.75
    assert document["planned_bytes"] == Plan.load(folder / "plan.json").size().total_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "pruning"),
    [
        (["--prune", "0.5"], Sparsity(0.5)),
        (["--prune", "conv*=0.5", "--prune", "fc=0.8"], Sparsity({"conv*": 0.5, "fc": 0.8})),
        (["--prune", "0.6", "--prune-by", "network"], mpq_library.GlobalSparsity(0.6)),
        (["--prune", "re:conv.=1.2", "--prune-by", "deviations"], mpq_library.Deviations({"re:conv.": 1.2})),
    ],
    ids=str,
)
def test_prune_is_the_librarys(mpq: Mpq, folder: Path, words: list[str], pruning: mpq_library.Sparsity) -> None:
    planned(folder / "net.safetensors", Codebook(), 3).save(folder / "shared.json")
    made = mpq("compress", folder / "net.safetensors", folder / "shared.json", "-o", folder / "net.mpq", *words)
    assert made.code == 0, made.err
    plan = Plan.load(folder / "shared.json")
    after = expected(plan, finish(prune(conv_net(), pruning)))
    found = mpq_library.decompress(folder / "net.mpq")
    assert all(found[name].equal(tensor) for name, tensor in after.items())


def test_from_a_factory_as_json(mpq: Mpq, folder: Path) -> None:
    made = mpq(
        "compress", f"{ME}:factory", folder / "plan.json", "-o", folder / "x.mpq", "--coding", "packed", "--json"
    )
    assert made.code == 0
    document = json.loads(made.out)
    assert document["bytes"] == Container.open(folder / "x.mpq").size
    assert document["container"] == str(folder / "x.mpq")
    assert document["left_out"] == []
    assert 0 < document["all"]["entropy_bits"] <= 4 * document["all"]["weights"]
    back = json.loads(mpq("decompress", folder / "x.mpq", "-o", folder / "x.safetensors", "--json").out)
    assert back == {"checkpoint": str(folder / "x.safetensors"), "tensors": len(conv_net().state_dict())}


def test_what_a_checkpoint_holds_beside_its_weights_is_said(mpq: Mpq, folder: Path) -> None:
    torch.save({"state_dict": conv_net().state_dict(), "epoch": 3, "best": 0.5}, folder / "net.pt")
    made = mpq("compress", folder / "net.pt", folder / "plan.json", "-o", folder / "net.mpq")
    assert made.code == 0
    assert made.err == "mpq: left out, no tensors of the model: epoch, best\n"
    Plan.load(folder / "plan.json").with_activation_bits(8).save(folder / "a8.json")
    made = mpq("compress", folder / "net.safetensors", folder / "a8.json", "-o", folder / "net.mpq")
    assert made.err == "mpq: note: the plan's activations (8 bits) are not in a container; weights only\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compress", "net.safetensors", "plan.json"], "Missing option '-o'"),
        (["compress", "net.safetensors", "plan.json", "-o", "net.safetensors"], "is the source itself"),
        (["compress", "net.safetensors", "plan.json", "-o", "plan.json"], "is the source itself"),
        (["compress", "net.safetensors", "plan.json", "-o", "no/x.mpq"], "there is no folder"),
        (["compress", "net.safetensors", "plan.json", "-o", "."], "ends in .mpq"),
        (["compress", "net.safetensors", "plan.json", "-o", "other.th"], "ends in .mpq"),
        (["compress", "nowhere.safetensors", "plan.json", "-o", "x.mpq"], "no such file"),
        (["compress", "net.safetensors", "net.safetensors", "-o", "x.mpq"], "not JSON"),
        (["compress", "net.safetensors", "plan.json", "-o", "x.mpq", "--prune", "1"], "prune: 1.0 is not allowed"),
        (
            ["compress", "net.safetensors", "plan.json", "-o", "x.mpq", "--prune", "most"],
            "prune: 'most' is not allowed",
        ),
        (["compress", "net.safetensors", "plan.json", "-o", "x.mpq", "--prune", "=0.5"], "prune: '=0.5' is not"),
        (["compress", "net.safetensors", "plan.json", "-o", "x.mpq", "--prune", "x=0.5"], "'x' matches no layer"),
        (
            ["compress", "net.safetensors", "plan.json", "-o", "x.mpq", "--prune", "0.5", "--prune", "0.6"],
            "give one amount",
        ),
        (
            ["compress", "net.safetensors", "plan.json", "-o", "x.mpq", "--prune", "0.5", "--prune", "fc=0.6"],
            "give one",
        ),
        (
            ["compress", "net.safetensors", "plan.json", "-o", "x.mpq", "--prune", "fc=.5", "--prune", "fc=.9"],
            "given twice",
        ),
        (["compress", "net.safetensors", "plan.json", "-o", "x.mpq", "--prune-by", "network"], "give --prune too"),
        (
            ["compress", "net.safetensors", "plan.json", "-o", "x.mpq", "--prune", "fc=0.5", "--prune-by", "network"],
            "without globs",
        ),
        (
            ["compress", "net.safetensors", "plan.json", "-o", "x.mpq", "--prune", "99", "--prune-by", "deviations"],
            "layer 'conv1': .* would prune all of it",
        ),
        (["decompress", "plan.json", "-o", "x.safetensors"], "is no container"),
        (["decompress", "nowhere.mpq", "-o", "x.safetensors"], "cannot read it"),
        (["decompress", "plan.json", "-o", "x.pt"], "name a file that ends in that"),
        (["inspect", "net.safetensors"], "is no container"),
        (["inspect", "plan.json", "--plan", "plan.json"], "is the source itself"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    mpq: Mpq, folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    ran = mpq(*words)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("mpq: error: ")
    assert ran.err.count("\n") == 1
    assert re.search(message, ran.err), ran.err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_more_centroids_than_weights(mpq: Mpq, folder: Path) -> None:
    ran = mpq("plan", folder / "net.safetensors", "-a", "uniform", "--bits", 8, "--scheme", "codebook")
    assert ran.code == 2
    assert "layer 'conv1': 8 bits are 256 centroids, more than the 216 weights that share them" in ran.err


@pytest.mark.slow
def test_codebooks_are_of_whole_layers_unless_asked_otherwise(mpq: Mpq, folder: Path) -> None:
    words = ["-a", "budget", "--average-bits", 2, "--bits", "1-3", "--scheme", "codebook", "--no-parts"]
    source, plan_file = folder / "net.safetensors", folder / "budget.json"
    assert mpq("plan", source, *words, "-o", plan_file).code == 0
    assert {layer.scheme for layer in Plan.load(plan_file).layers} == {Codebook()}
    words = [*words, "--granularity", "per_channel", "--init", "optimal", "--skip", "fc", "-o", plan_file]
    ran = mpq("plan", source, *words)
    assert ran.code == 0, ran.err
    schemes = {layer.scheme for layer in Plan.load(plan_file).layers}
    assert schemes == {Codebook(granularity="per_channel", init="optimal")}


def test_a_damaged_file_is_said_by_both_and_nothing_is_written(mpq: Mpq, folder: Path) -> None:
    mpq("compress", folder / "net.safetensors", folder / "plan.json", "-o", folder / "net.mpq")
    data = bytearray((folder / "net.mpq").read_bytes())
    data[200] ^= 4
    (folder / "net.mpq").write_bytes(data)
    for words in (["inspect", folder / "net.mpq"], ["decompress", folder / "net.mpq", "-o", folder / "x.safetensors"]):
        ran = mpq(*words)
        assert ran.code == 2
        assert "tensor 'bn1.weight': is damaged, its checksum differs" in ran.err
    assert not (folder / "x.safetensors").exists()


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(folder: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))

    command = [
        sys.executable,
        "-m",
        "mpq_plugins",
        "compress",
        "net.safetensors",
        "plan.json",
        "-o",
        "net.mpq",
    ]
    before = set(folder.iterdir())
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, preexec_fn=limited, check=False)
    assert ran.returncode == 2, ran.stderr
    assert "cannot write it (File too large). Is the disk full?" in ran.stderr
    assert set(folder.iterdir()) == before
