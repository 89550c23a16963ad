"""The example on files whose codes are entropy coded, cut to what a test can afford."""

import sys
from pathlib import Path

import pytest
from torch import nn

from examples import coded_resnet, nncodec_files
from examples.cifar_resnet import calibration, resnet
from examples.coded_resnet import COMPENSATED, NEAREST, Study, points
from examples.nncodec_files import COARSEST, FINEST, Coded

FEW = 8


@pytest.fixture
def cut(zoo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [calibration()[0][:FEW]]
    monkeypatch.setattr(coded_resnet, "calibration", lambda: few)


@pytest.mark.usefixtures("cut")
@pytest.mark.filterwarnings("ignore::mpq_plugins.RoundingWarning")
def test_inputs_are_worth_more_than_bits() -> None:
    study = Study(resnet(20))
    compensated, nearest = points(study, (COMPENSATED, NEAREST), (2.0,), (0,))
    for one in (compensated, nearest):
        assert 1.96 <= one.file_bits <= 2.0
    assert compensated.divergence < 0.9 * nearest.divergence
    assert compensated.top1[0] > 86


@pytest.mark.usefixtures("cut")
def test_the_example_prints_a_table_and_draws_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    picture = tmp_path / "coded.png"
    words = ["--nets", "20", "--bits", "2.5", "--only", "coded, nearest", "nncodec", "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", ["coded_resnet", *words])
    monkeypatch.setattr(nncodec_files, "installed", lambda: False)
    coded_resnet.main()
    out = capsys.readouterr().out
    assert "nncodec is not installed, and is left out" in out
    assert out.count(NEAREST) == 2  # as they come, and in the table
    assert "91.73" in out
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("bits", [0.2, 1.0, 1.1, 2.7, 40.0])
def test_the_other_codecs_file_nearest_in_size_is_found(bits: float) -> None:
    sizes = {qp: 2 * 2 ** (-qp / 16) for qp in range(FINEST, COARSEST + 1)}
    found = nncodec_files.nearest(lambda qp: Coded(b"", sizes[qp]), bits)
    assert abs(found.bits - bits) == min(abs(size - bits) for size in sizes.values())


def test_what_the_other_codec_wrote_is_the_net_again() -> None:
    pytest.importorskip("nncodec")
    net = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
    file = nncodec_files.coder(net, {"0.weight"})(FINEST)
    again = nncodec_files.decoded(file.data, net)
    assert again.keys() == net.state_dict().keys()
    assert (again["0.weight"] - net.get_parameter("0.weight")).abs().max() < 0.01
