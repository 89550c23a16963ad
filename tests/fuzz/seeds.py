"""Whole files of every format, small, for the fuzzer to tamper with."""

import json
import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mpq_plugins import Affine, Codebook, MixQuant, Piecewise, Plan, Store, Uniform, compress, measure
from mpq_plugins.allocation.ptilmpq import PTILMPQ
from tests.helpers.checkpoints import sharded

from .odd import NAMES, damaged, json_bytes, odd_value, tampered

STATE = {
    "conv.weight": (4, 4, 2, 2),
    "conv.bias": (4,),
    "fc.weight": (3, 8),
    "norm.weight": (4,),
    "embed.weight": (6, 4),
}


def state() -> dict[str, torch.Tensor]:
    """A model's tensors."""
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in STATE.items()}


def make(folder: Path) -> None:
    """Write one whole file of every format."""
    tensors = state()
    save_file(tensors, folder / "net.safetensors", {"format": "pt"})
    torch.save({"state_dict": tensors, "epoch": 3}, folder / "net.pt")
    sharded(folder / "net", tensors)
    schemes = {
        "plan": None,
        "channel": Affine(granularity="per_channel"),
        "group": Affine(granularity="per_group", group_size=2),
    }
    for name, scheme in schemes.items():
        table = measure(folder / "net.safetensors", scheme, per_channel=name != "group")
        table.save(folder / f"{name}.mpqt")
        MixQuant(qem=2)(table).save(folder / f"{name}.json")
    channel = measure(folder / "net.safetensors", Piecewise(granularity="per_channel"), per_channel=True)
    PTILMPQ(alpha=0.5)(channel).save(folder / "parts.json")
    book = measure(folder / "net.safetensors", Codebook(), (2, 3))
    Uniform(bits=3)(book).save(folder / "book.json")
    for name in ("plan", "parts", "book"):
        compress(folder / "net.safetensors", Plan.load(folder / f"{name}.json"), folder / f"{name}.mpq")
    (folder / "latency.json").write_text(json.dumps({layer: {"4": 0.1, "8": 0.2} for layer in ("conv", "fc", "embed")}))
    with suppress(KeyboardInterrupt), Store(folder / "store.partial") as store:
        store.job("sweep", {"evaluation": "e"}).add_row("a", {"score": 0.5})
        store.job("measure", {"weights": "w"}).add_arrays("conv", {"mse": torch.ones(2).double().numpy()})
        raise KeyboardInterrupt  # or it would go
    (folder / "old.partial").write_bytes(b"mpq-partial 1\njob\n")


def tamper(path: Path, rng: random.Random) -> None:
    """Change the file, or one file of the directory, in place."""
    if path.is_dir():
        path = rng.choice(sorted(path.iterdir()))
    if path.suffix == ".json" and rng.random() < 0.8:
        document: Any = json.loads(path.read_bytes())
        for _ in range(rng.choice((1, 1, 2, 5))):
            document = tampered(document, rng)
        path.write_bytes(json_bytes(document, rng))
    elif path.suffix == ".safetensors" and rng.random() < 0.6:
        _safetensors(path, rng)
    elif path.suffix == ".pt" and rng.random() < 0.6:
        torch.save(_odd_content(rng), path)
    else:
        path.write_bytes(damaged(path.read_bytes(), rng))


def _safetensors(path: Path, rng: random.Random) -> None:
    """Another header over the same data, its length true; or other tensors."""
    if rng.random() < 0.5:
        names = rng.sample(NAMES, 3) if rng.random() < 0.5 else ["a.weight", "b.weight", "c.bias"]
        save_file({name.encode(errors="ignore").decode(): _odd_tensor(rng).contiguous() for name in names}, path)
        return
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json_bytes(tampered(json.loads(data[8 : 8 + size]), rng), rng)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


def _odd_content(rng: random.Random) -> Any:
    tensors: dict[Any, Any] = dict(state())
    for _ in range(rng.choice((1, 2, 4))):
        key = rng.choice(list(tensors))
        action = rng.randrange(6)
        if action == 0:
            tensors[rng.choice((*NAMES, 0, 1.5, None, ("a", 1)))] = tensors.pop(key)
        elif action == 1:
            tensors[key] = odd_value(rng)
        elif action == 2:
            tensors[key] = rng.choice((tensors, torch.ones(3, 4).to_sparse(), torch.ones(3, 4, device="meta")))
        else:
            tensors[key] = _odd_tensor(rng)
    return rng.choice(
        (tensors, {"state_dict": tensors}, {"model": {"state_dict": tensors}}, [tensors], {"a": tensors, "b": tensors})
    )


def _odd_tensor(rng: random.Random) -> torch.Tensor:
    shape = rng.choice(((4, 3), (0, 4), (), (1,), (3, 2, 2), (2, 3, 2, 2), (1, 1, 1, 1, 1, 1), (300, 1)))
    value = torch.randn(shape)
    kind = rng.randrange(12)
    if kind == 0:
        return torch.nn.Parameter(value)
    if kind == 1:
        return value.half()
    if kind == 2:
        return value.to(rng.choice((torch.int8, torch.float64, torch.bfloat16, torch.complex64, torch.bool)))
    if kind == 3:
        return value * rng.choice((0.0, float("nan"), float("inf"), 1e38, 1e-40))
    if kind == 4 and value.dim() > 1:
        return value.transpose(0, 1).contiguous()
    return value


def special(folder: Path) -> None:
    """What lies about and is no file."""
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
