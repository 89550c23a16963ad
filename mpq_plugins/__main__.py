"""The process that is `mpq`: what interrupts it is said from the first import to the last line."""

import os
import sys
from contextlib import suppress

from .common.interrupts import Interrupted, Interrupts, ignore_signals


def main() -> None:
    """Run `mpq` as `cli.main` does. Ctrl-C while it is being imported is one line too; after the result it is late."""
    Interrupts().start()
    try:
        from .cli.main import main as run

        run()
    except Interrupted as stop:
        with suppress(OSError):
            os.write(2, f"mpq: {stop}\n".encode())
        sys.exit(stop.code)
    finally:
        ignore_signals()


if __name__ == "__main__":
    main()
