"""Learned rounding: the block reconstruction that Brevitas ships, over any plan, on a CPU and in float32.

Each block's rounding is learned so that its output on quantized inputs comes close to the float model's, with the
parametrization of AutoRound (arXiv 2309.05516) and blocks as in BRECQ (arXiv 2102.05426). Brevitas's own entry trains
under fp16 autocast, prints, and leaves all parameters frozen; this one drives its trainer without.
"""

import contextlib
import io
import warnings
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from brevitas.core.function_wrapper import RoundSte
from brevitas.core.function_wrapper.learned_round import LearnedRoundSte
from brevitas.inject.enum import LearnedRoundImplType
from brevitas.optim.sign_sgd import SignSGD
from torch import Tensor, nn

from mpq_plugins.errors import MismatchError, SettingError, first_few

from .brevitas_graph import brevitas_settings_kept
from .brevitas_tune import Batch, Progress, begin_at_float, called_layers, given_batches, ready, report, run
from .brevitas_verify import is_quantized, weight_codes

ROWS = 64  # inputs a step


def learned_round(
    quantized: nn.Module,
    batches: Iterable[Batch],
    *,
    blocks: Sequence[str] = (),
    steps: int = 200,
    lr: float = 5e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> nn.Module:
    """Learn for every weight whether to round up or down, block by block, and keep each block's best step.

    blocks: globs on module names, of which the outermost that match are blocks (`layer?.*`: the residual blocks of a
    ResNet); layers in none, and by default all, are blocks of their own. steps: for each block, on up to 64 inputs of
    one batch; lr: of sign gradient descent, falling to 0. One block's inputs and outputs at a time are held in memory.
    Codes move by one at most; scales, zero points and widths stay the plan's, and parameters as trainable as they
    were. The same seed gives the same weights. Warns, by name, of layers that it leaves as they were: of 1 bit,
    ternary, embeddings, and those that no batch reaches. Raises SettingError: batches that the model cannot take,
    activations without ranges, a glob that matches no module, steps below 1; MismatchError: a block whose output is
    no tensor.
    """
    given = given_batches(batches)
    if steps < 1 or not lr > 0:
        raise SettingError(f"learned_round: steps {steps!r}, lr {lr!r}: steps must be 1 or more, and lr above 0")
    tuned = ready(quantized)
    reached = called_layers(tuned, given[0])
    layers = {name: module for name, module in tuned.named_modules() if is_quantized(module)}
    begin_at_float(layers)
    learned = {name: module for name, module in layers.items() if name in reached and _rounds(module)}
    chosen = _blocks(tuned, blocks, learned)
    trainable = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
    injectors = {name: cast(Any, module).weight_quant.quant_injector for name, module in learned.items()}
    with brevitas_settings_kept(), torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        _insert(learned)
        _trainer(steps, lr).train(
            tuned, run, _call, given, _Cache(progress, list(chosen)), lambda _: list(chosen.values())
        )
    for name, module in learned.items():
        _bake(module, injectors[name])
    for name in trainable:
        tuned.get_parameter(name).requires_grad_(True)
    left = [repr(name) for name in layers if name not in learned]
    if left:
        warnings.warn(
            f"learned_round leaves {first_few(left, ', ')} as they were: 1 bit, ternary, embeddings, or reached by no "
            "batch",
            stacklevel=2,
        )
    return tuned


class _Cache(torch.utils.data.Dataset[Any]):
    """A block's inputs on quantized activations and its float outputs, batch by batch, for Brevitas's trainer."""

    def __init__(self, progress: Progress | None, names: Sequence[str]) -> None:
        self.progress, self.names, self.started = progress, names, 0
        self.inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.outputs: list[Tensor] = []

    def reset_cache(self) -> None:
        """Brevitas calls this as it comes to a block."""
        report(self.progress, self.names[self.started], self.started, len(self.names))
        self.started += 1
        self.inputs, self.outputs = [], []

    def store_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What a block was called with."""
        self.inputs.append((args, kwargs))

    def store_output(self, output: Any) -> None:
        """What it gave."""
        self.outputs.append(_first(output))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        return self.inputs[index], self.outputs[index]

    def collate_fn(self, drawn: list[tuple[Any, Tensor]]) -> tuple[Any, Tensor]:
        """Some rows of one batch."""
        ((args, kwargs), output) = drawn[0]
        rows = torch.randperm(len(output))[:ROWS]

        def some(value: Any) -> Any:
            by_row = isinstance(value, Tensor) and value.dim() > 0 and len(value) == len(output)
            return value[rows] if by_row else value

        return (tuple(map(some, args)), {key: some(value) for key, value in kwargs.items()}), output[rows]


def _blocks(model: nn.Module, globs: Sequence[str], learned: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The outermost modules that a glob matches, and the layers in none of them, in the model's order."""
    holding = {name for own in learned for name in _prefixes(own)}
    candidates = {name: module for name, module in model.named_modules() if name in holding}
    unmatched = [repr(glob) for glob in globs if not any(fnmatchcase(name, glob) for name in candidates)]
    if unmatched:
        raise SettingError(
            f"blocks: {first_few(unmatched, ', ')} match no module that has a rounding to learn; such are "
            f"{first_few([repr(name) for name in candidates], ', ')}"
        )
    chosen: dict[str, nn.Module] = {}
    for name, module in candidates.items():
        inside = any(name.startswith(f"{block}.") for block in chosen)
        if not inside and (name in learned or any(fnmatchcase(name, glob) for glob in globs)):
            chosen[name] = module
    if not chosen:
        raise SettingError("learned_round: no layer that a batch reaches has a rounding to learn")
    return chosen


def _prefixes(name: str) -> list[str]:
    """A module's name and those of what it lies in, the model aside."""
    parts = name.split(".")
    return [".".join(parts[: length + 1]) for length in range(len(parts))]


def _rounds(module: nn.Module) -> bool:
    """Whether a layer rounds to integers; binary and ternary weights do not, and Brevitas leaves embeddings out."""
    return hasattr(module.weight_quant.tensor_quant, "int_quant") and not isinstance(module, nn.Embedding)  # type: ignore[union-attr]


def _insert(learned: dict[str, nn.Module]) -> None:
    from brevitas_examples.common.learned_round.learned_round_method import insert_learned_round_quantizers

    for module in learned.values():
        insert_learned_round_quantizers(module, LearnedRoundImplType.IDENTITY)
        if not any(isinstance(child, LearnedRoundSte) for child in module.modules()):
            raise MismatchError(f"{type(module).__name__}: Brevitas gave it no learned rounding")


def _trainer(steps: int, lr: float) -> Any:
    # Imported here, for it takes accelerate along, which takes a second.
    from brevitas_examples.common.learned_round.learned_round_args import (
        LossArgs,
        LRSchedulerArgs,
        OptimizerArgs,
        TrainerConfig,
        TrainingArgs,
    )
    from brevitas_examples.common.learned_round.learned_round_method import MSELoss
    from brevitas_examples.common.learned_round.learned_round_trainer import LearnedRoundTrainer

    falling = LRSchedulerArgs(torch.optim.lr_scheduler.LinearLR, {"start_factor": 1.0, "end_factor": 0.0})
    optimizer = OptimizerArgs("learned_round", SignSGD, lr, {}, falling)
    arguments = TrainingArgs([optimizer], batch_size=1, iters=steps, losses_args=[LossArgs(MSELoss, {})], use_amp=False)
    return LearnedRoundTrainer(TrainerConfig(arguments))


def _call(block: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    args, kwargs = inputs
    return _first(block(*args, **kwargs))


def _first(output: Any) -> Tensor:
    """A block's output; of several, the first."""
    found = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(found, Tensor):
        raise MismatchError(f"learned_round: a block gives a {type(output).__name__}, no tensor; choose other blocks")
    return found


def _bake(module: nn.Module, injector: Any) -> None:
    """Set the weight to what was learned, and round to nearest again: what follows needs to know of no learning."""
    proxy, weight = cast(Any, module).weight_quant, cast(Tensor, module.weight)
    proxy.eval()
    weight.data.copy_(weight_codes(module).value.reshape(weight.shape))
    proxy.tensor_quant.int_quant.float_to_int_impl = RoundSte()
    proxy.quant_injector = injector


@contextlib.contextmanager
def _quiet() -> Any:
    """Without the trainer's prints and bars, for progress tells the same, and without Brevitas's remark to itself."""
    drop = io.StringIO()
    with contextlib.redirect_stdout(drop), contextlib.redirect_stderr(drop), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Positional args are being deprecated", FutureWarning)
        yield
