"""`mpq demo`: a first run without a download."""

from pathlib import Path

import click

from ..help import SectionCommand
from ..output import claim, json_option, print_json, say_written


@click.command(cls=SectionCommand)
@click.option("-o", "--output", type=click.Path(path_type=Path), default="demo.json", show_default=True)
@json_option
def demo(output: Path, as_json: bool) -> None:
    """Quantize a small trained network of handwritten digits with four allocators, and write the plan to keep."""
    from ...report.console import console
    from ...report.progress import progress_bar
    from ..demo.run import demo_json, demo_report, run_demo

    claim(output, "a plan")
    with progress_bar("demo") as progress:
        result = run_demo(progress)
    result.plan.save(output)
    if as_json:
        print_json(demo_json(result) | {"plan": str(output)})
        return
    demo_report(result, console(), str(output))
    say_written(output, "plan")
