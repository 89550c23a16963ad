"""`--help` in sections: options by what they are about, commands by what they are for.

By click's own formatter: rich-click makes the same sections, and more than half as much start-up again.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import click

from ..report.progress import say
from .defaults import KEY, default_map
from .verbosity import verbosity_options

# Option names as commands have them, by section and in the order in which sections are shown.
SECTIONS: dict[str, tuple[str, ...]] = {
    "Plan": (
        "allocator", "types", "activation_bits", "activation_range", "activation_share", "activation_dynamic",
        "activation_symmetric", "uniform", "judge", "budgets", "bits", "metrics", "sensitivity", "per_channel_errors",
        "input_shape", "backend", "policy", "tolerable_loss", "target", "runtime", "config_only", "onto", "source",
        "file_format",
    ),
    "Pruning and coding": ("file_bits", "file_size", "amounts", "prune_by", "coding"),
    "Learning": (
        "blocks", "steps", "batch_size", "lr", "loss", "regulariser", "mix", "correct", "tune", "seed", "memory",
    ),
    "Inputs and evaluation": (
        "sensitivities", "activations", "input_bits", "calibration", "synthetic", "rounding", "output_function",
        "evaluation",
    ),
    "Layers and weights": ("skip", "only", "model_factory", "weights", "already_quantized", "fold_bn"),
    "Scheme": ("scheme_name",),
    "Where it runs": ("workers", "dask", "device", "port", "no_browser"),
    "Output": ("output", "force", "cache", "plot", "plan_file", "as_json", "verbose", "quiet"),
}  # fmt: skip
WRITTEN = ("output", "plot", "plan_file")  # what is written
FORCE_KEY = "mpq_plugins.force"
OTHER, LAST = "Options", "Output"
COMMANDS: dict[str, dict[str, str]] = {
    "Decide": {
        "measure": "Measure every layer's error at every width.",
        "import": "Take what another tool measured or decided.",
        "plan": "Decide the bits of every layer.",
        "sweep": "Plan over a grid of an allocator's parameters.",
        "pareto": "Plan with every allocator at the same sizes.",
        "evaluate": "Score plans, rounded in one way or another.",
        "tune": "Find the smallest plan that is good enough.",
    },
    "Look": {
        "show": "Show a plan layer by layer, or a table.",
        "diff": "Show what differs between two plans.",
        "check": "Check a plan against weights, or a backend.",
        "inspect": "Show what a container holds.",
        "report": "Write a page of a table's plans that re-plans.",
        "explore": "Serve that page here, with exact plans.",
        "plugins": "List what is installed.",
    },
    "Apply": {
        "apply": "Write a checkpoint with quantized weights.",
        "export": "Write a checkpoint that another stack loads.",
        "reconstruct": "Learn rounding block by block (BRECQ).",
        "compress": "Write a model and its plan as one small file.",
        "decompress": "Write a container as a checkpoint.",
    },
    "Try": {"demo": "Compare four allocators on a small network."},
}


class SectionOption(click.Option):
    """An option that says its section itself, as those made from fields do."""

    def __init__(self, *arguments: Any, section: str, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.section = section


class SectionCommand(click.Command):
    """A command whose options are listed by section; --verbose and --quiet are among them.

    One that writes a file has --force too.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        if any(isinstance(each, click.Option) and each.name in WRITTEN for each in self.params):
            self.params.append(_force_option())
        self.params += verbosity_options()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take what mpq.toml says where the command line says nothing."""
        defaults = ctx.meta.get(KEY)
        if defaults is not None and defaults.of(str(ctx.info_name)):
            ctx.default_map = default_map(defaults, self, ctx)
        left = super().parse_args(ctx, args)
        if defaults is not None and ctx.default_map:
            say(f"note: defaults for options are read from {defaults.path.name}")
        return left

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections that this command has options of; those of fields follow what names their owner."""
        records: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                records.setdefault(section_of(parameter), []).append(record)
        for title in _in_order(records):
            with formatter.section(title):
                formatter.write_dl(records[title])


def _force_option() -> click.Option:
    return click.Option(
        ["--force"], is_flag=True, expose_value=False, callback=_keep_force,
        help="Write over a file that is not known to be mpq's own.",
    )  # fmt: skip


def _keep_force(context: click.Context, _: click.Parameter, force: bool) -> None:
    context.meta[FORCE_KEY] = force


class SectionGroup(click.Group):
    """A group whose commands are listed by section; --verbose and --quiet may come before the command, too."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.params += verbosity_options()

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write every command with its first sentence."""
        width = formatter.width - 6 - max(map(len, self.commands))
        left = dict(self.commands)
        for title, names in COMMANDS.items():
            with formatter.section(title):
                formatter.write_dl([(name, names[name]) for name in names if left.pop(name)])
        if left:
            with formatter.section("Commands"):
                formatter.write_dl([(name, command.get_short_help_str(width)) for name, command in left.items()])


def section_of(parameter: click.Parameter) -> str:
    """The title under which an option is listed."""
    if isinstance(parameter, SectionOption):
        return parameter.section
    if "--help" in parameter.opts:
        return LAST
    return next((title for title, names in SECTIONS.items() if parameter.name in names), OTHER)


def _in_order(titles: Iterable[str]) -> Iterator[str]:
    """As in SECTIONS, those of an allocator's fields after the plan's, what has no section last."""
    known: Sequence[str] = list(SECTIONS)
    yield from sorted(titles, key=lambda title: known.index(title) if title in known else _place(title, len(known)))


def _place(title: str, last: int) -> float:
    return last if title == OTHER else 0.5
