"""`mpq decompress`: a container back as a checkpoint."""

from pathlib import Path

import click

from ...report.progress import echo, progress_bar
from ..help import SectionCommand
from ..output import claim, json_option, print_json


@click.command(cls=SectionCommand, epilog="Example: mpq decompress model.mpq -o model.safetensors")
@click.argument("container_file", metavar="CONTAINER", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Checkpoint to write (.safetensors)."
)
@json_option
def decompress(container_file: Path, output: Path, as_json: bool) -> None:
    """Write CONTAINER's tensors, dequantized, as a checkpoint."""
    from ...compression.container import decompress as read
    from ...compression.write import save_tensors
    from ..output import check_output

    if output.suffix != ".safetensors":
        raise click.UsageError(f"-o {output}: the result is written as safetensors; name a file that ends in that")
    check_output(output, container_file)
    claim(output, "a checkpoint")
    with progress_bar("decompressing") as progress:
        tensors = read(container_file, progress=progress)
    save_tensors(tensors, output)
    if as_json:
        print_json({"checkpoint": str(output), "tensors": len(tensors)})
    else:
        echo(f"wrote {output}: {len(tensors)} tensors")
