"""Pages of real and of synthetic networks."""

from functools import cache
from pathlib import Path

import mpq_plugins as mpq
from mpq_plugins import LayerTable
from mpq_plugins.cli.demo.net import digit_net
from mpq_plugins.report.page.document import PageDocument
from mpq_plugins.report.page.measured import Measured
from mpq_plugins.report.page.writer import page_html


@cache
def demo_table() -> LayerTable:
    """The demo's network, channels measured too."""
    return mpq.measure(digit_net(), mpq.Affine(granularity="per_channel"), range(1, 9), per_channel=True)


@cache
def resnet_table(depth: int, folder: Path) -> LayerTable:
    """A network of the zoo, as `mpq measure` measures a file."""
    from examples.cifar_resnet import CHECKPOINTS

    return mpq.measure(folder / "cifar10" / CHECKPOINTS[depth], bits=range(1, 9))


def bare(table: LayerTable, file: str = "net.mpqt", judge: str | None = "mse") -> PageDocument:
    """A page of a table without any plans beside, which take most of the time."""
    layers = tuple(
        {"name": one.name, "kind": one.kind, "shape": list(one.shape), "channel_axis": one.channel_axis,
         "tied": list(one.tied)}
        for one in table.layers
    )  # fmt: skip
    return PageDocument(file, layers, Measured(table, file, judge), ())


def bare_html(table: LayerTable) -> str:
    """The same as a file."""
    return page_html(bare(table))
