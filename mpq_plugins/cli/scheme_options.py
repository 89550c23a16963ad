"""The options that describe a measurement, and the request they make."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from .output import weights_option

Command = TypeVar("Command", bound=Callable[..., Any])
SCHEME_NAMES = (
    "scheme_name", "symmetric", "granularity", "group_size", "range_name", "breakpoint_rule", "storage", "init",
    "skip", "only", "fold_bn", "weights", "already_quantized",
)  # fmt: skip


def scheme_options(command: Command) -> Command:
    """The options that say what is measured, and under which scheme."""
    for option in reversed(
        (
            click.option(
                "--scheme",
                "scheme_name",
                help="affine, piecewise (two regions), codebook (shared weights); default: the allocator's, or affine.",
            ),
            click.option(
                "--granularity", help="per_tensor (default: the allocator's, or this), per_channel or per_group."
            ),
            click.option("--group-size", type=int, help="Weights per group along the input axis; implies per_group."),
            click.option("--symmetric/--asymmetric", default=None, help="Zero point at zero, or not (default)."),
            click.option(
                "--range", "range_name", help="minmax (default), or mse: the clipping of least squared error."
            ),
            click.option(
                "--breakpoint",
                "breakpoint_rule",
                help="Of two regions: search (default), gaussian, laplacian, gaussian_root or laplacian_root.",
            ),
            click.option("--storage", help="Of two regions: region_bit (default, b + 1 bits a weight) or shared (b)."),
            click.option("--init", help="Of a codebook: linear (default), optimal, density or forgy."),
            click.option(
                "--skip",
                multiple=True,
                metavar="GLOB",
                help="Leave these layers alone; repeatable. A glob, re:REGEX, or in language models role:embeddings, "
                "role:lm_head or role:routers.",
            ),
            click.option(
                "--only",
                multiple=True,
                metavar="GLOB",
                help="Take only these layers; repeatable. Also those that checkpoints' plans leave alone: role:lora, "
                "role:fragile.",
            ),
            weights_option,
            click.option(
                "--already-quantized",
                is_flag=True,
                default=None,
                help="Of a checkpoint whose layers are packed already, plan what is left in floating point.",
            ),
            click.option(
                "--fold-bn",
                type=click.Choice(["auto", "yes", "no"]),
                help="Measure conv weights with BatchNorm folded in; auto: a module's, per tensor.",
            ),
        )
    ):
        command = option(command)
    return command
