"""`mpq measure --activations`, and what `mpq show` says of it: the library's own numbers, one line for what is not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpq_plugins import Activations, Affine, LayerTable, measure, measure_activations
from tests.conftest import Ran
from tests.helpers import nets
from tests.helpers.tables import contents

pytestmark = pytest.mark.usefixtures("one_thread")

Mpq = Callable[..., Ran]

ME = "tests.cli.test_measured_inputs"
CONV_NET = "tests.helpers.nets:conv_net"
SCHEME = ("--granularity", "per_channel", "--range", "minmax", "--bits", "2,4")
ON_INPUTS = ("--activations", "--calibrate", f"{ME}:batches")


def batches() -> list[Tensor]:
    return list((torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(2)) + 0.3).split(8))


def zeros() -> list[Tensor]:
    return [torch.zeros(2, 3, 8, 8)]


class Twice(nn.Module):
    """Two layers that read one tensor, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.left(x)) * self.right(x))
        return logits


def twice() -> nn.Module:
    torch.manual_seed(0)
    return Twice().eval()


def rows() -> list[Tensor]:
    return [torch.randn(6, 8, generator=torch.Generator().manual_seed(1))]


def expected(**options: Any) -> LayerTable:
    table = measure(nets.conv_net(), Affine(granularity="per_channel"), (2, 4), per_channel=True)
    return measure_activations(nets.conv_net(), table, batches(), **options)


def refused(ran: Ran, message: str) -> None:
    assert ran.code == 2, ran.out
    assert message in " ".join(ran.err.split())
    assert "Traceback" not in ran.err


def test_inputs_are_the_librarys_and_are_kept(mpq: Mpq, tmp_path: Path) -> None:
    out = tmp_path / "net.mpqt"
    ran = mpq("measure", CONV_NET, *SCHEME, *ON_INPUTS, "-o", out, "--json")
    assert ran.code == 0, ran.err
    table, ours = LayerTable.load(out), expected()
    assert contents(table) == contents(ours)
    assert table.input_bits == (2, 3, 4, 5, 6, 7, 8, 16)
    printed = json.loads(ran.out)
    assert printed["activations"] == "asymmetric mse"
    assert printed["input_bits"] == list(table.input_bits)
    assert printed["live"] == [list(live) for live in ours.live]
    for layer in ours.layers:
        own = layer.inputs
        assert own is not None
        assert printed["inputs"][layer.name] == {
            "numel": own.numel, "tensor": own.tensor,
            "errors": {name: values.tolist() for name, values in own.errors.items()},
            "sensitivities": {"output_mse": own.sensitivities["output_mse"].tolist()},
        }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["net.mpqt"]


@pytest.mark.parametrize("words", [(), ("--workers", "2")])
def test_sensitivities_that_inputs_have_are_measured_of_them_too(mpq: Mpq, tmp_path: Path, words: Any) -> None:
    out = tmp_path / "net.mpqt"
    asked = ("--sensitivity", "kl", "--sensitivity", "fisher", "--input-bits", "4,8", *words)
    ran = mpq("measure", CONV_NET, *SCHEME, *ON_INPUTS, *asked, "-o", out)
    assert ran.code == 0, ran.err
    table = LayerTable.load(out)
    assert table.sensitivities == ("kl", "fisher")
    ours = expected(bits=(4, 8), sensitivities=("kl",))
    assert contents([layer.inputs for layer in table.layers]) == contents([layer.inputs for layer in ours.layers])


def test_how_inputs_are_quantized_is_said_as_for_plans(mpq: Mpq, tmp_path: Path) -> None:
    out = tmp_path / "net.mpqt"
    words = ("--activation-range", "percentile", "--activation-share", "0.99", "--activation-symmetric")
    ran = mpq("measure", CONV_NET, *SCHEME, *ON_INPUTS, "--input-bits", "4", *words, "-o", out)
    assert ran.code == 0, ran.err
    how = Activations(8, symmetric=True, range="percentile", share=0.99)
    assert contents(LayerTable.load(out)) == contents(expected(bits=(4,), activations=how))
    assert "of quantized inputs, symmetric percentile 0.99" in " ".join(ran.out.split())


def test_show_lists_inputs_and_which_tensors_are_the_same(mpq: Mpq, tmp_path: Path) -> None:
    out = tmp_path / "net.mpqt"
    words = ("--activations", "--input-bits", "4,8", "--calibrate", f"{ME}:rows", "-o", out)
    ran = mpq("measure", f"{ME}:twice", *SCHEME, *words)
    assert ran.code == 0, ran.err
    shown = mpq("show", out)
    assert shown.code == 0
    assert shown.out.strip() in ran.out
    text = " ".join(shown.out.split())
    assert "output_mse of quantized inputs, asymmetric mse" in text
    assert "same tensor as" in text
    assert "inputs 16 values a sample, 8 at once" in text
    table = LayerTable.load(out)
    own = table.layers[1].inputs
    assert own is not None
    assert own.tensor == "left"
    assert f"{own.sensitivities['output_mse'][0]:.4g}" in text
    plain = tmp_path / "plain.mpqt"
    measure(twice(), bits=(2, 4)).save(plain)
    assert "inputs" not in mpq("show", plain).out


BAD: list[tuple[str, tuple[str, ...], str]] = [
    (CONV_NET, ("--activations",), "--activations are measured on inputs: give --calibrate too"),
    (CONV_NET, ("--input-bits", "4"), "--input-bits are widths of inputs"),
    (CONV_NET, (*ON_INPUTS, "--input-bits", "1-8"), "inputs of 1 bit are not allowed"),
    (CONV_NET, (*ON_INPUTS, "--input-bits", "17"), "bits: 17 is not allowed; 2 to 16"),
    (CONV_NET, ("--activations", "--calibrate", f"{ME}:zeros"), "layer 'conv1': its inputs are all zero"),
    (CONV_NET, ("--activation-range", "kl"), "activation-range: says how inputs are measured; --activations"),
    (CONV_NET, (*ON_INPUTS, "--activation-range", "kll"), "activation-range: 'kll' is not allowed; minmax"),
    (CONV_NET, (*ON_INPUTS, "--activation-share", "0.9"), "share: belongs to the percentile range"),
    (CONV_NET, (*ON_INPUTS, "--activation-dynamic", "per_token"), "per_token belongs to linear layers"),
    (CONV_NET, (*ON_INPUTS, "--types", "int8"), "--activations means nothing with --types"),
]


@pytest.mark.parametrize(("source", "words", "message"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_measured_is_one_line_and_no_file(
    mpq: Mpq, tmp_path: Path, source: str, words: tuple[str, ...], message: str
) -> None:
    scheme = () if "--types" in words else SCHEME
    refused(mpq("measure", source, *scheme, *words, "-o", tmp_path / "net.mpqt"), message)
    assert not (tmp_path / "net.mpqt").exists()


def test_a_file_has_no_inputs(mpq: Mpq, tmp_path: Path) -> None:
    torch.save(nets.conv_net().state_dict(), tmp_path / "net.pt")
    ran = mpq("measure", tmp_path / "net.pt", *ON_INPUTS, "-o", tmp_path / "net.mpqt")
    refused(ran, "activations: ")
    refused(ran, "is a file, and only a module can be run: package.module:factory")
