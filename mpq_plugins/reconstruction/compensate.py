"""Compensated rounding: closed form, one forward pass, no gradients.

Columns of a layer are rounded one after another, and those not yet rounded make good what the rounded ones lost (GPTQ,
Frantar et al. 2022, arXiv 2210.17323; targets from the float net, GPTAQ, Li et al. 2025, arXiv 2504.02692). The float
net and the quantized net run side by side, and BatchNorm's statistics and biases are corrected as they go.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.progress import Progress, check_callbacks
from ..common.store import Store, opened
from ..common.workers import check_executor
from ..errors import RoundingWarning, SettingError
from ..models.arguments import check_module
from ..models.copying import duplicate
from ..models.device import checked_device
from ..models.folding import folded_copy
from ..models.input_ranges import input_ranges, put_input_ranges, take_input_ranges
from ..models.running import checked_batches, evaluating
from ..models.tracing import Traced
from ..plans.arguments import check_plan
from ..plans.plan import Plan
from ..simulation.calibrate import plans_ranges
from ..simulation.match import match
from ..simulation.shifts import own_biases
from .compensation_run import CompensationRun
from .finished import FinishedLayers, job_of
from .nets import as_the_models, device_of, on_device
from .rounding import refuse_stochastic
from .settings import Compensation, LayerReport, Outliers
from .streams import JOIN

MOST_THREADS = 4096


def compensate(  # noqa: PLR0913  # each option is a user's word
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Any],
    *,
    columns: int = 1 << 16,
    damping: float = 0.01,
    seed: int = 0,
    new_biases: bool = True,
    outliers: Outliers = "leave_out",
    device: str | torch.device | None = None,
    executor: Executor | None = None,
    store: str | Path | Store | None = None,
    progress: Progress | None = None,
    finished: Callable[[LayerReport], None] | None = None,
) -> nn.Module:
    """Round weights so that layers make good each other's errors, in a float copy with the weights on the plan's grids.

    OBQ's update column by column (GPTQ, arXiv 2210.17323), towards the float model's outputs (GPTAQ, arXiv 2504.02692),
    on the inputs that the quantized model so far gives; then local moves. Any scheme, any widths inside a layer. It
    corrects BatchNorm statistics and biases on the way, as `correct` does. Quantizing the copy by the plan leaves
    compensated weights as they are: `apply`, every adapter and the container find them in it.

    Under `EntropyCoded` with steps, codes of layers whose bytes the plan promises (`coded_bytes`) are kept to them, by
    their entropy: where they would take more, codes are rounded to what costs fewer bits for the least loss.

    Where the plan quantizes inputs, the quantized model gives such ones (`calibrate_inputs` says in which ranges), and
    the copy has ranges where the model has.

    Layers that cannot be compensated keep their float weights, which the plan rounds to nearest, and a warning lists
    them: layers that compute in their own way or are never called, other dtypes than float32. So do channels whose
    levels quantizing would not find again, as with two-region schemes, which look for their regions anew. Embeddings,
    and weights shared with one, are rounded to nearest too.

    All batches run side by side, so a forward that takes a lock from one layer to another would wait for ever, and one
    that draws random numbers is rounded on other draws than the float model's.

    Args:
        model: The float model; it is not changed.
        plan: The plan.
        batches: Inputs without labels, as for `correct`. A few hundred samples do. All batches are on their way through
            both nets at once, so memory has to hold their activations at one depth.
        columns: Output positions of a convolution that are looked at, drawn evenly from all samples; 32 times its
            inputs where that is more. Of linear layers all are.
        damping: What is added to the diagonal of the second moments of a layer's inputs, as a share of its mean.
        seed: Of the positions that are drawn.
        new_biases: Whether a layer without a bias may get one, which takes its mean error. A checkpoint whose runtime
            knows no such tensor, as of most language models, has no place for it: False leaves it out.
        outliers: What is done with tokens whose outputs are more than three times as long as most, as those of a
            text's first are in many transformers (Sun et al. 2024, arXiv 2402.17762). `leave_out` of a layer's sums,
            which is better where a normalisation behind the layer takes the length away (BERT's encoder); or `shorten`
            to that length, for causal language models, whose other tokens look at the first.
        device: Where the nets run, by default where the model is.
        executor: A concurrent.futures.Executor, whose workers sum over a batch each what decides a layer's rounding.
            Layers come one after another, for each is rounded on what those before it give. The copy is the same to the
            last bit.
        store: Where finished layers are kept, so that the same call goes on there: a file's path, which is there until
            the model is returned, or an open `Store`.
        progress: Called with (layer, steps done, steps in all).
        finished: Called with each layer's LayerReport.

    Returns:
        The copy.

    Raises:
        SettingError: An argument is not allowed, the plan rounds stochastically, the model does not run on the inputs,
            or a layer's inputs hold NaN. The message names the layer; finished ones stay in the store.
        MismatchError: The plan is for another model.
        WeightError: A weight cannot be quantized.
        WorkerError: An executor's workers fail, or a layer cannot be sent to them.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> plan = mpq.Uniform(bits=2)(mpq.measure(net, mpq.Affine(granularity="per_channel")))
        >>> rounded = mpq.compensate(net, plan, [torch.randn(256, 8)])
        >>> torch.equal(mpq.apply(rounded, plan)[0].weight, rounded[0].weight)
        True
    """
    made, notes = compensated_with_notes(
        model, plan, batches, columns=columns, damping=damping, seed=seed, new_biases=new_biases, outliers=outliers,
        device=device, executor=executor, store=store, progress=progress, finished=finished,
    )  # fmt: skip
    for note in notes:
        warnings.warn(RoundingWarning(note), stacklevel=2)
    return made


def compensated_with_notes(  # noqa: PLR0913  # as compensate
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Any],
    *,
    columns: int = 1 << 16,
    damping: float = 0.01,
    seed: int = 0,
    new_biases: bool = True,
    outliers: Outliers = "leave_out",
    device: str | torch.device | None = None,
    executor: Executor | None = None,
    store: str | Path | Store | None = None,
    progress: Progress | None = None,
    finished: Callable[[LayerReport], None] | None = None,
) -> tuple[nn.Module, list[str]]:
    """What `compensate` gives, and what it warns of, for who tries several times."""
    check_module(model)
    check_plan(plan)
    settings = Compensation(columns=columns, damping=damping, seed=seed, new_biases=new_biases, outliers=outliers)
    check_callbacks(progress=progress, finished=finished)
    check_executor(executor)
    with torch.inference_mode(mode=False), torch.no_grad():
        traced = Traced(model)
        plan = match(plan, model, rewrapped=True, traced=traced).require(type(model).__name__)
        refuse_stochastic(plan, "compensated rounding")
        given = checked_batches(batches)
        _check_threads(given)
        home = device_of(model)
        place = checked_device(device, dtype=torch.float32) or home
        exact = folded_copy(traced, plan)
        carried = bool(input_ranges(exact))
        ranges = plans_ranges(exact, plan, given)
        rough = duplicate(exact)
        if carried:
            take_input_ranges(exact)
        else:
            put_input_ranges(rough, ranges)
        own_biases(rough)
        for net in (exact, rough):
            net.to(place).requires_grad_(False)
        given = [on_device(batch, place) for batch in given]
        with opened(store) as kept, evaluating(exact), evaluating(rough):
            layers = None
            if kept is not None:
                layers = FinishedLayers(kept.job("compensate", job_of(model, plan, given, settings, place)))
            job = CompensationRun.of(exact, rough, plan, given, settings, layers)
            job.run(given, executor, progress, finished)
        if not carried:
            take_input_ranges(rough)
        as_the_models(model, rough)
        return rough.to(home), job.notes()


def _check_threads(batches: Sequence[Any]) -> None:
    """Each batch is run in two threads, and each of these has a team of torch's; a process has its limits."""
    threads = 2 * len(batches) * torch.get_num_threads()
    if threads > MOST_THREADS:
        raise SettingError(
            f"batches: {len(batches)} of them side by side take {threads:,} threads here, of at most "
            f"{MOST_THREADS:,}; {JOIN}"
        )
