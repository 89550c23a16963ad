"""Block reconstruction against the straightforward loop, back to back: CPU time of learning ResNet-20's blocks.

    python -m tests.benchmarks.bench_reconstruct [--steps 400]

The straightforward loop does in each step what BRECQ's published code does (arXiv 2102.05426): BatchNorm folded, floor,
add h(V), clamp and dequantize every weight, a random permutation of all cached inputs for 32 of them, the p-norm, the
regulariser layer by layer, Adam as it comes. Both learn from the same number of steps on inputs of the same shape.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import mpq_plugins as mpq
from examples.cifar_resnet import Block, need_networks, resnet
from mpq_plugins.models.folding import fold_batch_norm
from mpq_plugins.report.tables import grid

ZETA, GAMMA, SAMPLES, BATCH = 1.1, -0.1, 1024, 32
Loop = Callable[[Block, Tensor, Tensor, int], None]
BLOCKS = {"layer1.1": (16, 32, 32), "layer2.1": (32, 16, 16), "layer3.1": (64, 8, 8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    need_networks(parser)
    torch.set_num_threads(2)
    net, rows = resnet(20), []
    for name, shape in BLOCKS.items():
        block = net.get_submodule(name)
        assert isinstance(block, Block)
        inputs = torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(0)).relu()
        (plain, _), (ours, rest), (mixed, _) = (
            learning_time(loop, block, inputs, steps)
            for loop in (plain_loop, partial(our_loop, 0.0), partial(our_loop, 0.5))
        )
        rows.append((name, f"{plain:.1f}", f"{ours:.1f}", f"{plain / ours:.2f}x", f"{mixed:.1f}", f"{rest:.1f}"))
    columns = ("block", "straightforward loop", "mpq.reconstruct", "less", "with mix=0.5", "seconds beside the steps")
    Console(width=110, highlight=False).print(grid("ResNet-20: CPU milliseconds a step, 2 threads", columns, rows))


def learning_time(loop: Loop, block: Block, inputs: Tensor, steps: int) -> tuple[float, float]:
    """CPU milliseconds a step, and CPU-seconds of all else: capturing, and losses over all inputs."""
    with torch.no_grad():
        outputs = torch.cat([block(part) for part in inputs.split(128)])
    loop(block, inputs, outputs, 5)
    few, many = (_spent(loop, block, inputs, outputs, count) for count in (steps // 8, steps))
    each = (many - few) / (steps - steps // 8)
    return 1000 * each, many - steps * each


def _spent(loop: Loop, block: Block, inputs: Tensor, outputs: Tensor, steps: int) -> float:
    start = time.process_time()
    loop(block, inputs, outputs, steps)
    return time.process_time() - start


def our_loop(mix: float, block: Block, inputs: Tensor, outputs: Tensor, steps: int) -> None:
    net = nn.Sequential(block, nn.Identity()).eval()
    plan = mpq.Uniform(bits=2)(mpq.measure(net, mpq.Affine(granularity="per_channel", range="mse"), (2,)))
    mpq.reconstruct(net, plan, list(inputs.split(128)), steps=steps, batch_size=BATCH, mix=mix)


def plain_loop(block: Block, inputs: Tensor, outputs: Tensor, steps: int) -> None:
    folded = fold_batch_norm(block)
    layers = [_PlainLayer(conv) for conv in (folded.conv1, folded.conv2) if isinstance(conv, nn.Conv2d)]
    optimizer = torch.optim.Adam([layer.v for layer in layers])
    weights = torch.ones_like(outputs)  # the cached gradients, which are fetched whatever the loss
    for step in range(steps):
        rows = torch.randperm(len(inputs))[:BATCH]
        x, target, _ = inputs[rows], outputs[rows], weights[rows]
        optimizer.zero_grad()
        y = F.relu(layers[1](F.relu(layers[0](x))) + x)
        loss = (y - target).abs().pow(2.0).sum(1).mean()
        beta = 20 - 18 * step / steps
        for layer in layers:
            loss = loss + 0.01 * (1 - ((layer.h() - 0.5).abs() * 2).pow(beta)).sum()
        torch.autograd.backward(loss, retain_graph=True)
        optimizer.step()


class _PlainLayer:
    """A convolution whose weight is quantized anew in each forward."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self.weight, self.bias = conv.weight.detach(), conv.bias
        low, high = self.weight.amin((1, 2, 3), keepdim=True), self.weight.amax((1, 2, 3), keepdim=True)
        self.scale = (high - low) / 3
        self.zero_point = (-low / self.scale).round()
        share = self.weight / self.scale - (self.weight / self.scale).floor()
        self.v = nn.Parameter(-torch.log((ZETA - GAMMA) / (share - GAMMA) - 1))

    def h(self) -> Tensor:
        return torch.clamp(torch.sigmoid(self.v) * (ZETA - GAMMA) + GAMMA, 0, 1)

    def __call__(self, x: Tensor) -> Tensor:
        codes = torch.clamp((self.weight / self.scale).floor() + self.h() + self.zero_point, 0, 3)
        return F.conv2d(x, (codes - self.zero_point) * self.scale, self.bias, padding=1)


if __name__ == "__main__":
    main()
