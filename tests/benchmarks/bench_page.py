"""What a page takes: seconds of a processor to write, bytes, and in a browser milliseconds to open and to re-plan."""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpq_plugins import Affine, LayerTable, measure
from mpq_plugins.report.page.document import page_of_table
from mpq_plugins.report.page.writer import page_html
from tests.helpers.synthetic_tables import llama_7b, many_layers, resnet152, synthetic_table
from tests.report.page.browsers import started

OPENED = "return performance.getEntriesByType('navigation')[0].loadEventEnd"
REPLANNED = """const timed = (values) => {
  const start = performance.now();
  window.mpq.change(values);
  return performance.now() - start;
};
const values = (i) => ({budget: 2.5 + i / 20, qem: 1.1 + i / 15, alpha: i / 40});
return ["budget", "mixquant", "ptilmpq"].map((allocator) =>
  Math.min(...Array.from({length: 40}, (_, i) => timed({allocator, ...values(i)}))))"""


def tables() -> Iterator[tuple[str, LayerTable]]:
    """Networks by name."""
    from examples.cifar_resnet import CHECKPOINTS, ZOO

    scheme = Affine(granularity="per_channel", range="mse")
    yield "ResNet-20, from its table", measure(ZOO / CHECKPOINTS[20], scheme, range(1, 9), per_channel=True)
    yield "500 layers", synthetic_table(many_layers(500))
    yield "ResNet-152", synthetic_table(resnet152())
    yield "a 7 B transformer", synthetic_table(llama_7b())
    yield "10,000 layers", synthetic_table(many_layers(10_000))


def timed(browser: Any, file: Path) -> tuple[float, list[float]]:
    """Milliseconds until the page is there, and to re-plan by each allocator."""
    opened = []
    for _ in range(4):
        browser.get(file.as_uri())
        opened.append(float(browser.execute_script(OPENED)))
    return min(opened), browser.execute_script(REPLANNED)


def main() -> None:
    """Print a row a network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    print("| network | CPU-s | kB | opens, ms | re-plans: Budget, MixQuant, PTILMPQ, ms |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, started() as browser:
        for name, table in tables():
            start = time.process_time()
            html = page_html(page_of_table(table, "net.mpqt", {}, title=name))
            spent = time.process_time() - start
            file = Path(folder) / "page.html"
            file.write_text(html, encoding="utf-8")
            opened, replanned = timed(browser, file)
            each = ", ".join(f"{one:.0f}" for one in replanned)
            print(f"| {name} | {spent:.1f} | {len(html.encode()) / 1e3:,.0f} | {opened:.0f} | {each} |", flush=True)


if __name__ == "__main__":
    main()
