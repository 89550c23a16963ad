"""Learned rounding: the block reconstruction that Brevitas ships, over any plan, in float32.

Each block's rounding is learned so that its output on quantized inputs comes close to the float model's, with the
parametrization of AutoRound (arXiv 2309.05516) and blocks as in BRECQ (arXiv 2102.05426). Brevitas's own entry trains
under fp16 autocast, prints, cannot place modules that have two names, and leaves all parameters frozen; this one
drives its trainer block by block without.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from brevitas.core.function_wrapper import RoundSte
from brevitas.core.function_wrapper.learned_round import LearnedRoundSte
from brevitas.inject.enum import LearnedRoundImplType
from brevitas.optim.sign_sgd import SignSGD
from torch import Tensor, nn

from mpq_plugins.common.progress import Progress
from mpq_plugins.errors import MismatchError, SettingError, WeightError
from mpq_plugins.reconstruction.blocks import find_units

from .batches import Batch, called_layers, check_schedule, given_batches, ready, report, run
from .float_weights import begin_at_float, require_float
from .graph import brevitas_settings_kept, quiet_state_dict
from .read import is_quantized, weight_codes
from .tuning import finish

Call = tuple[tuple[Any, ...], dict[str, Any]]


def learned_round(
    quantized: nn.Module,
    batches: Iterable[Batch],
    *,
    blocks: str | Sequence[str] = (),
    steps: int = 200,
    lr: float = 5e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> nn.Module:
    """Learn for every weight whether to round up or down, block by block; a block that gets no better stays as it was.

    One block's inputs and outputs at a time are held in memory. Codes move by one at most; scales, zero points and
    widths stay the plan's, and parameters as trainable as they were. It begins at the float weights and biases,
    whatever was tuned before. It warns, by name, of layers that it leaves as they were: of 1 bit, ternary, embeddings,
    those that no batch reaches.

    Args:
        quantized: What `to_brevitas` made; it is changed.
        batches: Inputs without labels. Each step is on one of them, so give batches of 32 or more.
        blocks: Globs, or `re:` and a regular expression, on module names, of which the outermost that match are blocks
            (`layer?.*`: the residual blocks of a ResNet). Layers in none, and by default all, are blocks of their own.
        steps: For each block.
        lr: Of sign gradient descent, falling to 0.
        seed: The same seed gives the same weights.
        progress: Called with (block, steps done, steps in all).

    Returns:
        The model.

    Raises:
        SettingError: The model cannot take the batches, activations have no ranges, the model was trained or loaded so
            that its float weights are gone, a glob matches no module, steps are below 1, or no code changed.
        MismatchError: A block's output is no tensor.
        WeightError: A block gives NaN.
    """
    given = given_batches(batches)
    check_schedule("learned_round", "steps", steps, lr)
    tuned = ready(quantized)
    reached = called_layers(tuned, given)
    layers = {name: module for name, module in tuned.named_modules() if is_quantized(module)}
    learned = {name: module for name, module in layers.items() if name in reached and _rounds(module)}
    chosen = _blocks(tuned, (blocks,) if isinstance(blocks, str) else blocks, learned)
    require_float(tuned, "learned_round")
    begin_at_float(layers)
    before = {name: weight_codes(module).codes for name, module in layers.items()}
    trainable = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    injectors = {name: cast(Any, module).weight_quant.quant_injector for name, module in learned.items()}
    with brevitas_settings_kept(), quiet_state_dict(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        _insert(learned)
        for module in learned.values():
            _begin_at_plan(module)
        with _trainer(steps, lr) as trainer:
            for done, (name, block) in enumerate(chosen.items()):
                report(progress, name, done, len(chosen))
                _learn(trainer, tuned, name, block, given)
        report(progress, "done", len(chosen), len(chosen))
    for name, module in learned.items():
        _round_to_learned(module, injectors[name])
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_(name in trainable)
    finish("learned_round", tuned, before, learned, calls=1)
    return tuned


def _learn(trainer: Any, model: nn.Module, name: str, block: nn.Module, batches: list[Batch]) -> None:
    """One block: its inputs from the quantized model so far, its outputs from the float one."""
    cache = _Calls(name)
    trainer._populate_cache(cache, model, run, block, batches)
    if len(cache.inputs) != len(cache.outputs):
        raise MismatchError(
            f"learned_round: the quantized model reaches block {name!r} in {len(cache.inputs)} of {len(batches)} "
            f"batches and the float one in {len(cache.outputs)}, for it decides by values: skip it in the plan"
        )
    losses, loader = trainer._instantiate_losses(block), trainer._instantiate_block_dataloader(cache)
    rounding = [module for module in block.modules() if isinstance(module, LearnedRoundSte)]
    values = {id(module.value) for module in rounding}
    begun = [module.value.detach().clone() for module in rounding]
    unlearned = _error(block, cache)
    for module in rounding:
        module.train()
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in values)
    trainer._training_loop(block, _call, loader, losses)
    block.eval()
    if not _error(block, cache) < unlearned:
        for module, value in zip(rounding, begun, strict=True):
            module.value.data.copy_(value)


@torch.no_grad()
def _error(block: nn.Module, cache: "_Calls") -> float:
    """Mean squared error of a block's output over all batches."""
    pairs = [cache[index] for index in range(len(cache))]
    squared = sum(float((_call(block, inputs) - output).square().sum()) for inputs, output in pairs)
    return squared / sum(output.numel() for _, output in pairs)


class _Calls(torch.utils.data.Dataset[Any]):
    """What a block was called with, batch by batch, and what it gave, for Brevitas's trainer."""

    def __init__(self, block: str) -> None:
        self.block = block
        self.inputs: list[Call] = []
        self.outputs: list[Tensor] = []

    def store_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call's arguments."""
        self.inputs.append((args, kwargs))

    def store_output(self, output: Any) -> None:
        """A call's output, of several the first."""
        first = _first(output)
        if not torch.isfinite(first).all():
            raise WeightError(f"learned_round: block {self.block!r} gives NaN or infinite values; look at the batches")
        self.outputs.append(first)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Call, Tensor]:
        return self.inputs[index], self.outputs[index]

    def collate_fn(self, drawn: list[tuple[Call, Tensor]]) -> tuple[Call, Tensor]:
        """One batch, whole: which of a call's dimensions is the batch's, only the model knows."""
        return drawn[0]


def _blocks(model: nn.Module, patterns: Sequence[str], learned: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The outermost modules that a pattern matches, and the layers in none of them, in the model's order."""
    if not learned:
        raise SettingError("learned_round: no layer that a batch reaches has a rounding to learn")
    names = find_units(model, list(learned), patterns) if patterns else learned
    return {name: model.get_submodule(name) for name in names}


def _rounds(module: nn.Module) -> bool:
    """Whether a layer rounds to integers; binary and ternary weights do not, and Brevitas leaves embeddings out."""
    return hasattr(module.weight_quant.tensor_quant, "int_quant") and not isinstance(module, nn.Embedding)  # type: ignore[union-attr]


def _insert(learned: Mapping[str, nn.Module]) -> None:
    from brevitas_examples.common.learned_round.learned_round_method import insert_learned_round_quantizers

    for module in learned.values():
        insert_learned_round_quantizers(module, LearnedRoundImplType.IDENTITY)
        if not any(isinstance(child, LearnedRoundSte) for child in module.modules()):
            raise MismatchError(f"{type(module).__name__}: Brevitas gave it no learned rounding")


def _begin_at_plan(module: nn.Module) -> None:
    """Let learning begin at the plan's own rounding: at 0, which is to nearest, or short of it by a dead zone."""
    int_quant, weight = cast(Any, module).weight_quant.tensor_quant.int_quant, cast(Tensor, module.weight)
    offset = getattr(int_quant, "plan_offset", None)  # the user's own conversion may have another class there
    if offset is not None:
        int_quant.float_to_int_impl.value.data.copy_(weight.detach().sign() * (offset - 0.5))


@contextlib.contextmanager
def _trainer(steps: int, lr: float) -> Iterator[Any]:
    """Brevitas's trainer, without its bars: progress tells the same."""
    # Imported here, for it takes accelerate along, which takes a second.
    from brevitas_examples.common.learned_round import learned_round_trainer
    from brevitas_examples.common.learned_round.learned_round_args import (
        LossArgs,
        LRSchedulerArgs,
        OptimizerArgs,
        TrainerConfig,
        TrainingArgs,
    )
    from brevitas_examples.common.learned_round.learned_round_method import MSELoss

    falling = LRSchedulerArgs(torch.optim.lr_scheduler.LinearLR, {"start_factor": 1.0, "end_factor": 0.0})
    optimizer = OptimizerArgs("learned_round", SignSGD, lr, {}, falling)
    arguments = TrainingArgs([optimizer], batch_size=1, iters=steps, losses_args=[LossArgs(MSELoss, {})], use_amp=False)
    bars = learned_round_trainer.tqdm
    learned_round_trainer.tqdm = partial(bars, disable=True)
    try:
        yield learned_round_trainer.LearnedRoundTrainer(TrainerConfig(arguments))
    finally:
        learned_round_trainer.tqdm = bars


def _call(block: nn.Module, inputs: Call) -> Tensor:
    args, kwargs = inputs
    return _first(block(*args, **kwargs))


def _first(output: Any) -> Tensor:
    """A block's output; of several, the first."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor) or first.dim() == 0:
        raise MismatchError(f"learned_round: a block gives a {type(output).__name__}, no tensor; choose other blocks")
    return first


def _round_to_learned(module: nn.Module, injector: Any) -> None:
    """Set the weight to what was learned, and round as the plan again: what follows needs to know of no learning."""
    proxy, weight = cast(Any, module).weight_quant, cast(Tensor, module.weight)
    proxy.eval()
    weight.data.copy_(weight_codes(module).value.reshape(weight.shape))
    proxy.tensor_quant.int_quant.float_to_int_impl = RoundSte()
    proxy.quant_injector = injector
