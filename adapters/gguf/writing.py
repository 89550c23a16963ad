"""Writing a GGUF file with a plan's types: tensor by tensor, everything else as it is."""

from collections.abc import Iterator
from pathlib import Path

from mpq_plugins.common.checks import path_of
from mpq_plugins.common.files import atomic_path, unchanged
from mpq_plugins.common.progress import Progress
from mpq_plugins.common.text import first_few
from mpq_plugins.errors import SettingError
from mpq_plugins.plans.affine import Affine
from mpq_plugins.plans.ggml import NEEDS_IMPORTANCE
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.plan import Plan

from ..contract import Exported
from .checks import Opened, Target, opened
from .encoding import encoded
from .layout import copied, layout, span

SUFFIX = ".gguf"


class Meter:
    """Says how many weights are done."""

    def __init__(self, source: Opened, progress: Progress | None) -> None:
        self.progress, self.done = progress, 0
        self.total = sum(choice.numel for target in source.targets for choice in target.choices)

    def __call__(self, choice: LayerChoice) -> None:
        """Before the work on a layer."""
        if self.progress is not None:
            self.progress(choice.name, self.done, self.total)
        self.done += choice.numel

    def finish(self) -> None:
        """After all work."""
        if self.progress is not None:
            self.progress("", self.total, self.total)


def export(source: Path, plan: Plan, output: Path, *, progress: Progress | None = None) -> Exported:
    """Write the GGUF file with the plan's types; an interruption leaves nothing half written.

    Args:
        source: The model's GGUF file; it is not changed.
        plan: The plan, of this file or of the checkpoint of transformers that it was converted from.
        output: The file to write.
        progress: Called with a layer's name, weights done and weights in all.

    Returns:
        What was written.

    Raises:
        SettingError: The format cannot hold the plan; or the output cannot be there.
        MismatchError: The plan is another model's.
        SourceError: The source cannot be read, or the file not written.
        WeightError: A weight is NaN or infinite, or beyond what the type's scales reach.
    """
    source, output = path_of("source", source), path_of("output", output)
    _check_output(source, output)
    made = opened(plan, source)
    plan_of_file, meter = layout(made.header, made.targets), Meter(made, progress)
    with atomic_path(output) as temporary, unchanged(source), temporary.open("wb") as file:
        file.write(plan_of_file.head)
        for target, entry in zip(made.targets, plan_of_file.entries, strict=True):
            file.seek(len(plan_of_file.head) + entry.offset)
            for data in _data(made, target, meter):
                file.write(data)
        end = file.tell()
        file.truncate(-(-end // made.header.alignment) * made.header.alignment)
    meter.finish()
    layers = [target for target in made.targets if target.kind not in (None, "f16")]
    taken = {entry.name: entry.size or 0 for entry in plan_of_file.entries}
    return Exported(
        output,
        sum(len(target.choices) for target in layers),
        sum(taken[target.entry.name] for target in layers),
        sum(taken.values()),
        tuple(_notes(made)),
    )


def _data(made: Opened, target: Target, meter: Meter) -> Iterator[bytes | memoryview]:
    if target.kind is None:
        yield from copied(made.header.path, *span(made.header, target.entry))
        return
    for blocks in encoded(target, meter):
        yield blocks.tobytes()


def _notes(made: Opened) -> Iterator[str]:
    from mpq_plugins.checkpoints.gguf_files import on_a_grid

    if rounded := on_a_grid(made.header.path):
        yield rounded
    blind = [target.entry.name for target in made.targets if target.rounds and target.kind in NEEDS_IMPORTANCE]
    if blind:
        yield (
            f"{first_few(blind, ', ')}: of a type that llama.cpp rounds by an importance matrix alone; rounded here as "
            "if all inputs mattered alike"
        )
    own = [target for target in made.targets if any(map(_loses_digits, target.choices)) and target.kind != "f16"]
    if own:
        yield (
            f"{len(own)} tensors hold the plan's own codes, with scales rounded to half precision: a weight may be off "
            "the plan's by 2^-11 of it, or of its block's offset"
        )


def _loses_digits(choice: LayerChoice) -> bool:
    """Whether half precision changes a scale or an offset of the plan's own codes."""
    scheme = choice.scheme
    if not isinstance(scheme, Affine):
        return False
    return not scheme.symmetric or getattr(scheme, "scale_dtype", "float32") != "float16"


def _check_output(source: Path, output: Path) -> None:
    if output.suffix != SUFFIX:
        raise SettingError(f"output: {output} should end in {SUFFIX}, by which llama.cpp's tools know the format")
    if output.resolve() == source.resolve():
        raise SettingError(f"output: {output} is the source itself; name another file")
    if output.is_dir():
        raise SettingError(f"output: {output} is a directory; name a file")
