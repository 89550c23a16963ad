"""Draws small changes of meaning and asks whether the related tests notice: `make mutants N=200 SEED=0`.

A change survives where all tests for its file pass. A survivor gets a test, or a line in equivalent.toml that says why
it changes nothing. The exit status says whether 85 % of the others were noticed. Verdicts are kept in build/mutants: a
run that was interrupted goes on from them.
"""

import argparse
import random
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue

from .changes import Change, walk
from .related import code_files, related
from .run import Tree, copied, digest
from .verdicts import Kept, Verdict, equivalents, table

ROOT = Path(__file__).parents[2]
ENOUGH = 0.85


def main() -> int:
    """Try the changes drawn; 0 where enough of them were noticed."""
    options = _options()
    files = {file: (ROOT / file).read_text() for file in code_files(ROOT) if options.only in file}
    drawn = random.Random(options.seed).sample(every := list(walk(files)), min(options.number, len(every)))
    known = equivalents()
    named = [(change, (change.file, *change.described(files[change.file]))) for change in drawn]
    tried = [change for change, name in named if name not in known]
    print(f"{len(every):,} changes in {len(files)} files; {len(drawn)} drawn, {len(drawn) - len(tried)} change nothing")
    kept = Kept(ROOT / "build" / "mutants" / "verdicts.jsonl")
    verdicts = _tried(tried, files, kept, options.jobs)
    return _said(verdicts)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("number", type=int, nargs="?", default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="Change only files whose path has this in it.")
    return parser.parse_args()


def _tried(changes: Sequence[Change], files: dict[str, str], kept: Kept, jobs: int) -> list[Verdict]:
    """A verdict for each, as they come from copies of the tree that take turns."""
    trees: SimpleQueue[Tree] = SimpleQueue()
    with ExitStack() as stack, ThreadPoolExecutor(jobs) as pool:
        for _ in range(jobs):
            trees.put(stack.enter_context(copied(ROOT)))

        unsound: set[str] = set()

        def judged(change: Change) -> Verdict:
            line, changed = change.described(files[change.file])
            tests = [test for group in related(ROOT, change.file) for test in group]
            code, others = digest(ROOT, [change.file]), digest(ROOT, tests)
            if verdict := kept.of((change.file, line, changed), code, others):
                return verdict
            tree = trees.get()
            try:
                verdict = Verdict(change.file, line, changed, tree.notices(change), code, others)
            finally:
                trees.put(tree)
                unsound.update(tree.unsound)
            kept.add(verdict)
            print(f"{verdict.noticed or 'NOT NOTICED'}\t{change.file}: {line} -> {changed}", flush=True)
            return verdict

        verdicts = list(pool.map(judged, changes))
    for test in sorted(unsound):
        print(f"fails on the code as it is, and was left out: {test}", file=sys.stderr)
    return verdicts


def _said(verdicts: Sequence[Verdict]) -> int:
    survivors = [verdict for verdict in verdicts if not verdict.noticed]
    path = ROOT / "build" / "mutants" / "survivors.toml"
    path.write_text(table(survivors))
    share = 1 - len(survivors) / max(len(verdicts), 1)
    print(f"{len(verdicts) - len(survivors)} of {len(verdicts)} noticed ({share:.0%}); survivors: {path}")
    return 0 if share >= ENOUGH else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, subprocess.CalledProcessError) as error:
        sys.exit(f"mutants: {error or 'interrupted; what was found is kept'}")
