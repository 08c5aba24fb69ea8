"""Hurt runs in every way we know, and see that nothing is lost: kills, stops, damage, full disks,
hostile input.

Prints a line for each kind; ends with 1 if anything did not survive. `--kinds KIND --case N`
repeats one case.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from pathlib import Path

ALL = "shard,hostile,checkpoint,disk,stall,kill,stop"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kinds", default=ALL, help="which, by commas (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="a few cases of each kind")
    parser.add_argument(
        "--seed", type=int, default=1, help="draws the places and moments of faults (default: 1)"
    )
    parser.add_argument(
        "--case", type=int, metavar="N", help="only this case of the one kind named, to repeat it"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures here: name, value, unit, n"
    )
    parser.add_argument("--folder", type=Path, help="make the temporary files in this folder")
    options = parser.parse_args()
    options.kinds = options.kinds.split(",")
    if unknown := sorted(set(options.kinds) - set(ALL.split(","))):
        parser.error(f"--kinds: unknown {unknown[0]!r}; expected some of {ALL}")
    if options.case is not None and len(options.kinds) > 1:
        parser.error("--case needs one kind in --kinds")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: its folder does not exist; make it first")
    return options


def main() -> int:
    options = parse_arguments()
    # Of the tests; our neighbours are no modules of anybody's.
    sys.path[0] = str(Path(__file__).parent.parent)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns where it has to find that out
    from faults.suite import figures, make_place, run_kind

    # What it says of damage is looked at.
    logging.getLogger("scaledistill").addHandler(logging.NullHandler())
    with tempfile.TemporaryDirectory(prefix="faults-", dir=options.folder) as name:
        place = make_place(Path(name), seed=options.seed, short=options.short, only=options.case)
        tallies = [run_kind(kind, place) for kind in options.kinds]
    if options.json:
        options.json.write_text(json.dumps(figures(tallies), indent=1) + "\n")
    failures = [failure for tally in tallies for failure in tally.failures]
    for failure in failures:
        sys.stdout.write(f"FAILED {failure}\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
