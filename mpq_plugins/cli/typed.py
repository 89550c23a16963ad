"""Tables of types on the command line: measured, printed, planned from."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import SettingError
from .types import NameList

if TYPE_CHECKING:  # `mpq --help` should not wait for them
    from ..common.store import Store
    from ..plans.plan import Plan
    from ..plans.type_table import TypeTable
    from .request import Request
    from .sources import Source

Command = TypeVar("Command", bound=Callable[..., Any])
COSTS_OF_ITS_OWN = "not compared with uniform widths: each type has a cost of its own"


def _names() -> Sequence[str]:
    from ..plans.types import families, type_names

    return (*families(), *type_names())


types_option = click.option(
    "--types", type=NameList(_names), metavar="LIST",
    help="Choose among types instead of widths: int4_g32, mxfp4, or families: int, mx, fp8.",
)  # fmt: skip


def measure_types_now(
    source: "Source",
    types: Sequence[str],
    metrics: Sequence[str],
    request: "Request",
    *,
    store: "Store | None" = None,
    executor: Executor | None = None,
    device: str | None = None,
) -> "TypeTable":
    """Measure every type with a progress bar. Raises SettingError for what a table of types leaves no choice of."""
    from ..measurement.measure import Means
    from ..measurement.measure_types import BASE, BASE_BITS, run_types
    from ..measurement.request import MeasureRequest
    from ..plans.types import types_of
    from ..report.progress import progress_bar

    if request.scheme_name is not None or request.scheme_fields:
        said = [name for name, _ in request.scheme_fields] or ["scheme"]
        raise SettingError(f"{said[0]}: means nothing with types, each of which has a scheme of its own; leave it out")
    if request.fold_bn == "yes":
        raise SettingError("fold-bn: means nothing with types; fold before, or leave it out")
    asked = MeasureRequest(
        BASE, BASE_BITS, metrics, skip=request.skip, only=request.only, fold_bn=False, weights=request.weights,
        already_quantized=bool(request.already_quantized),
    ).checked()  # fmt: skip
    with progress_bar("measuring") as progress:
        return run_types(source.weights, types_of(types), asked, Means(executor, store, device, progress))


def planned_types(
    source: "Source", types: Sequence[str] | None, allocators: Sequence[Any], request: "Request"
) -> "tuple[TypeTable, list[Plan]]":
    """The table of types, measured or given, and the plan of each allocator. Raises SettingError."""
    from ..allocation.budget import Budget
    from ..plans.type_table import TypeTable
    from .plans import plans_by

    for allocator in allocators:
        if not isinstance(allocator, Budget):
            raise SettingError(f"allocator: {allocator.name} needs widths; of types only budget chooses (-a budget)")
    if source.is_table:
        if types is not None or not (request.empty or request.from_file):
            raise SettingError(f"{source.text} is measured already; types, skip, only and the like go with a model")
        table = TypeTable.load(source.path)
    else:
        metrics = [name for allocator in allocators for name in allocator.needs.metrics]
        table = measure_types_now(source, types or (), tuple(dict.fromkeys(["relative", "mse", *metrics])), request)
    return table, plans_by(allocators, table)
