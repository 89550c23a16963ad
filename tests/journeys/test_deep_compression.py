"""The paper's pipeline on real digits, as the example has it, at a size that a test can afford."""

import struct
from functools import partial
from pathlib import Path

import pytest
import torch

from examples import deep_compression, lenet
from examples.cifar_resnet import evaluate
from examples.deep_compression import Setting, Task, budgeted, in_a_file, pruned, retrained, tuned
from examples.lenet import LeNet300
from examples.train_demo import split
from mpq_plugins.compression.stages import total

SPARSITY = {"fc1": 0.88, "fc2": 0.94, "fc3": 0.5}


@pytest.fixture(scope="module")
def task() -> Task:
    """LeNet-300-100 for 8 x 8 images, trained on a thousand of scikit-learn's digits."""
    (images, labels), (test_images, test_labels) = split()
    torch.manual_seed(0)
    net = lenet.train(LeNet300(64), (images, labels), 60, 2e-3, 0.05)
    inputs = torch.from_numpy(test_images).float().unsqueeze(1) / 16
    score = partial(evaluate, inputs=inputs, labels=torch.from_numpy(test_labels).long())
    setting = Setting("3 bits", SPARSITY, (0.4, 0.7, 1.0), budgeted(3))
    return Task("digits", net, partial(tuned, (images, labels)), score, (setting,), 80, 2e-3)


def test_thirty_times_smaller_at_half_a_point(task: Task) -> None:
    """On disk, everything in: biases, header and the plan itself."""
    small = pruned(task, task.settings[0])
    plan = task.settings[0].plan(small)
    trained = retrained(task, small, plan)
    stages, size = in_a_file(trained, plan)
    original = sum(4 * parameter.numel() for parameter in task.net.parameters())
    assert original / size >= 30
    before, after = task.score(task.net), task.score(trained)
    assert before[0] > 95
    assert after[0] >= before[0] - 0.5
    whole = total(stages)
    assert whole.sparsity >= 0.9
    assert whole.huffman < whole.packed < whole.sparse < whole.original


def test_the_rate_is_the_formulas(task: Task) -> None:
    small = pruned(task, Setting("once", SPARSITY, (1.0,), budgeted(3)))
    plan = budgeted(4)(small)
    stages, _ = in_a_file(small, plan)
    formula, taken = deep_compression.rates(stages, plan)
    assert taken == pytest.approx(formula, rel=0.005)  # whole bytes
    n, k = stages[0].entries, 2 ** (plan.layers[0].bits or 0)
    one = deep_compression.rates(stages[:1], plan.model_copy(update={"layers": plan.layers[:1]}))[0]
    assert one == pytest.approx(n * 32 / (n * (plan.layers[0].bits or 0) + k * 32))


def test_digits_are_read_out_of_a_pickle_that_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    def string(data: bytes) -> bytes:
        return b"T" + struct.pack("<I", len(data)) + data  # BINSTRING, as numpy's old pickles have arrays

    program = b"\x80\x02"
    for count in (3, 2, 1):
        pixels = struct.pack(f"<{784 * count}f", *([0.5] * 784 * count))
        program += string(pixels) + string(struct.pack(f"<{count}q", *range(count)))
    path = tmp_path / "mnist.pkl.gz"
    proof = tmp_path / "proof"
    program += b"cos\nsystem\n(S'touch " + str(proof).encode() + b"'\ntR."
    path.write_bytes(gzip.compress(program))
    monkeypatch.setattr(lenet, "digits_file", lambda: str(path))
    lenet.digits.cache_clear()
    (images, labels), (test_images, test_labels) = lenet.digits()
    lenet.digits.cache_clear()
    assert images.shape == (5, 1, 28, 28)
    assert labels.tolist() == [0, 1, 2, 0, 1]
    assert test_images.shape == (1, 1, 28, 28)
    assert test_labels.tolist() == [0]
    assert float(images.mean()) == 0.5
    assert not proof.exists()
