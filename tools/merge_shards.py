"""Write the shards of parts that were tokenised on several machines.

Example: python tools/make_shards.py books/*.txt --tokenizer bert-large-uncased --output shards \\
  --part 1/4   (and 2/4, 3/4, 4/4 on other machines), then python tools/merge_shards.py shards

DIR must hold the folders part-0001-of-0004 to part-0004-of-0004; they are kept. The shards are
those that one machine would have made. Exit codes: 0 done, 2 different settings, 3 missing or
damaged parts, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from make_shards import Display, print_summary


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "output", type=Path, metavar="DIR", help="folder with all parts; the shards go there too"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the shards in DIR once the new ones are finished",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Merge the parts and return the exit code."""
    options = parse_arguments(arguments)

    from rich.console import Console

    from scaledistill.data.prepare.compression import ReadProgress
    from scaledistill.data.prepare.make import Recipe
    from scaledistill.data.prepare.parts import merge_parts
    from scaledistill.errors import EXIT_ENVIRONMENT, ConfigError, DataError, named

    # Settings are options of make_shards.py.
    settings = [*(field.name for field in dataclasses.fields(Recipe)), "overwrite"]
    unlimited = argparse.Namespace(max_documents=None, max_tokens=None)
    display = Display(Console(stderr=True), ReadProgress(), unlimited)
    try:
        with display.bar, named(**{name: f"--{name.replace('_', '-')}" for name in settings}):
            report = merge_parts(options.output, overwrite=options.overwrite, on_progress=display)
    except (ConfigError, DataError) as error:
        print(f"merge_shards: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"merge_shards: {error}; check {options.output} and its disk", file=sys.stderr)
        return EXIT_ENVIRONMENT
    except KeyboardInterrupt:
        print("merge_shards: interrupted; no unfinished shards are left", file=sys.stderr)
        return 130
    if options.json:
        options.json.write_text(json.dumps(report.measurements(), indent=1) + "\n")
    print_summary(Console(), report, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
