"""Olive's widths by layer, as a plan: each layer's own, the default's, and what is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpq_plugins import Affine, Plan, apply, import_olive, measure, verify
from mpq_plugins.errors import FormatError, MismatchError, MPQError, SettingError
from mpq_plugins.quantization.quantize import fake_quantize
from tests.conftest import Ran

pytestmark = pytest.mark.usefixtures("one_thread")

ME = __name__
Mpq = Callable[..., Ran]
FOUR = {"bits": 4, "group_size": 32, "symmetric": True}
INFO: dict[str, Any] = {
    "default": FOUR,
    "overrides": {"up": {"bits": 8, "group_size": -1, "symmetric": False}, "down": {"bits": 2}},
}


class Net(nn.Module):
    """Words in, words out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(20, 32)
        self.mid, self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.lm_head = nn.Linear(32, 20)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.down(self.up(self.mid(self.embed_tokens(x)))))
        return logits


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def olive(directory: Path, document: Any) -> Path:
    path = directory / "olive.json"
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    "document",
    [
        INFO,
        {"mixed_precision_info": INFO},
        {"type": "HfModel", "config": {"model_attributes": {"mixed_precision_info": INFO}}},
    ],
)
def test_each_layer_has_its_own_width_or_the_default(tmp_path: Path, document: Any) -> None:
    model = net()
    plan = import_olive(olive(tmp_path, document), model)
    grouped = Affine(symmetric=True, granularity="per_group", group_size=32)
    assert {layer.name: (layer.bits, layer.scheme) for layer in plan.layers} == {
        "mid": (4, grouped),
        "up": (8, Affine(symmetric=False, granularity="per_channel")),
        "down": (2, grouped),
    }
    assert sorted(plan.skipped) == ["embed_tokens", "lm_head"]
    assert plan.allocator.name == "olive"
    assert plan.rest_bytes == measure(model, skip=["embed_tokens", "lm_head"]).rest_bytes
    quantized = apply(model, plan)
    verify(quantized, plan)
    weight = model.get_parameter("down.weight").detach()
    assert torch.equal(quantized.get_parameter("down.weight"), fake_quantize(weight, 2, grouped))


def test_named_heads_and_embeddings_have_their_widths_and_without_a_default_nothing_else(tmp_path: Path) -> None:
    tensor = {"bits": 8, "group_size": 0, "symmetric": True}
    path = olive(tmp_path, {"overrides": {"embed_tokens": tensor, "lm_head": {**FOUR, "bits": 16}}})
    plan = import_olive(path, net())
    assert [(layer.name, layer.bits) for layer in plan.layers] == [("embed_tokens", 8), ("lm_head", 16)]
    assert plan.layers[0].scheme == Affine(symmetric=True)
    assert sorted(plan.skipped) == ["down", "mid", "up"]


def test_what_is_skipped_stays_in_floating_point(tmp_path: Path) -> None:
    plan = import_olive(olive(tmp_path, INFO), net(), skip=["down", "mid"])
    assert [layer.name for layer in plan.layers] == ["up"]


def overriding(**entry: Any) -> dict[str, Any]:
    return {"default": FOUR, "overrides": {"up": entry}}


@pytest.mark.parametrize(
    ("document", "error", "said"),
    [
        ({"overrides": {"other": FOUR}}, MismatchError, "names 'other', which the source lacks"),
        ({"overrides": {"up": {"bits": 4}}}, FormatError, "'up': has no group_size, symmetric"),
        (overriding(bits=9), SettingError, "layer 'up'.*9"),
        (overriding(bits=True), FormatError, "bits: True is not allowed"),
        (overriding(group_size=48), SettingError, "layer 'up'.*48"),
        (overriding(group_size=-2), SettingError, "layer 'up'"),
        (overriding(symmetric=1), FormatError, "symmetric: 1 is not allowed"),
        (overriding(bits=4, algorithm="gptq"), FormatError, "'gptq'"),
        ({"mixed_precision_info": {**INFO, "more": 1}}, FormatError, r"\['more'\] is not read"),
        ({"layers": {}}, FormatError, "mixed_precision_info"),
        ({"overrides": {}}, SettingError, "gives no layer"),
    ],
)
def test_what_makes_no_plan_is_refused_by_name(tmp_path: Path, document: Any, error: type[MPQError], said: str) -> None:
    with pytest.raises(error, match=said):
        import_olive(olive(tmp_path, document), net())


def test_on_the_command_line(tmp_path: Path, mpq: Mpq) -> None:
    path, out, source = olive(tmp_path, INFO), tmp_path / "plan.json", ("--source", f"{ME}:net")
    ran = mpq("import", path, *source, "-o", out)
    assert ran.code == 0
    assert "3 layers at 4.80 bits a weight" in ran.out  # (4 * 1024 + 8 * 2048 + 2 * 2048) / 5120
    assert "in floating point: 2 layers" in ran.err
    assert Plan.load(out) == import_olive(path, net())
    assert mpq("check", out, f"{ME}:net").code == 0
    document = json.loads(mpq("import", path, *source, "-o", out, "--json").out)
    assert (document["layers"], sorted(document["skipped"])) == (3, ["embed_tokens", "lm_head"])
    measure(net()).save(tmp_path / "t.mpqt")
    for words, said in (
        (("--onto", tmp_path / "t.mpqt", *source), "has no use for it"),
        ((), "--source SOURCE: a file of olive needs it"),
    ):
        ran = mpq("import", path, *words, "-o", tmp_path / "none.json")
        assert (ran.code, said in ran.err, (tmp_path / "none.json").exists()) == (2, True, False)
