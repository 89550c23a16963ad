"""Files that carry a plan notice damage to either, as every file of ours."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mpq_plugins import Uniform, measure
from mpq_plugins.adapters.shared.carried import read_carried, write_carrying
from mpq_plugins.errors import FormatError


def shared_net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    return net


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    net, path = shared_net(), tmp_path / "net.safetensors"
    plan = Uniform(bits=4)(measure(net))
    write_carrying(net, plan, path, "ours", more="[1]")
    found = read_carried(path, "ours", "save", "more")
    assert (found[0], found[1]["more"]) == (plan, "[1]")
    state, data = load_file(path), path.read_bytes()
    for position in range(len(data)):
        for bit in (position % 8, 5):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                again = read_carried(path, "ours", "save", "more")
            except FormatError:
                continue
            assert again[0] == plan
            assert again[1]["more"] == "[1]"
            loaded = load_file(path)
            # A name may be another's: the model then misses its own.
            assert loaded.keys() != state.keys() or all(loaded[name].equal(state[name]) for name in state)


def test_files_of_the_version_without_checksums_are_read(tmp_path: Path) -> None:
    net, path = shared_net(), tmp_path / "net.safetensors"
    plan = Uniform(bits=4)(measure(net))
    write_carrying(net, plan, path, "ours")
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]["checksum"], header["__metadata__"]["tensors"]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    assert read_carried(path, "ours", "save")[0] == plan
    with pytest.raises(FormatError, match="carries no plan"):
        read_carried(path, "theirs", "save")
