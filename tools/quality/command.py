"""The experiments of docs/quality.md: distil students and compare them with other models.

`run` measures all cells that have no result yet, at idle priority; rerun the same command to
resume. `report` writes docs/quality.md from the results in docs/quality/results.

Example: python tools/quality run --tier small --text corpus/wiki_en_train.txt.xz \\
           --held-out corpus/wiki_en_heldout.txt.xz --data-dir glue
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cells import CONFIG, SMALL, Cell, Job, Lab
from results import Results

from scaledistill.data.manifest import Manifest, manifest_path
from scaledistill.errors import ConfigError, DataError, counted
from scaledistill.glue.listing import duration

ROOT = Path(__file__).parents[2]
FULL = """\
The tier "full" is MiniLMv2's published recipe. It takes days of GPU time; run these commands on a
cluster:

  python tools/make_shards.py --dataset wikimedia/wikipedia --dataset-config 20231101.en \\
    --tokenizer google-bert/bert-large-uncased --sequence-length 512 --held-out-fraction 0.001 \\
    --output shards/wiki-512
  deepspeed launch/distill.py --config configs/large_to_l6.json
  python tools/glue.py --model student=runs/large_to_l6/export/l6-h384 \\
    --model teacher=google-bert/bert-large-uncased --tasks mnli,qnli,qqp,rte,sst2,mrpc,cola,stsb \\
    --learning-rates 2e-5,5e-5,1e-4 --epochs 3,5,10 --seeds 1,2,3 --output runs/glue-full
  python tools/glue.py --model student=runs/large_to_l6/export/l6-h384 --tasks squad2 \\
    --output runs/squad-full
"""


def main() -> int:
    """Run the command line and return the exit code."""
    options = parse_arguments()
    # A shell starts background jobs with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        return int(options.run(options) or 0)
    except (ConfigError, DataError) as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; finished cells are kept, rerun the same command to resume\n")
        return 130


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="measure all cells that have no result yet")
    run.set_defaults(run=work)
    run.add_argument(
        "--tier",
        choices=("small", "full"),
        required=True,
        help="small: hours on two cores; full: print the commands for days on GPUs",
    )
    run.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="text to distil on, in a format of make_shards.py",
    )
    run.add_argument("--held-out", type=Path, metavar="FILE", help="text that no student sees")
    run.add_argument("--data-dir", type=Path, metavar="DIR", help="folder with the GLUE files")
    run.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/quality"),
        help="folder for unfinished work (default: %(default)s)",
    )
    run.add_argument(
        "--list",
        action="store_true",
        help="print what is left and how long it will take, and exit",
    )
    write = commands.add_parser("report", help="write docs/quality.md from the results")
    write.set_defaults(run=report)
    write.add_argument(
        "--document",
        type=Path,
        default=ROOT / "docs" / "quality.md",
        help="the document to update (default: %(default)s)",
    )
    for command in (run, write):
        command.add_argument(
            "--results",
            type=Path,
            default=ROOT / "docs" / "quality" / "results",
            help="folder of the results (default: %(default)s)",
        )
    options = parser.parse_args()
    if options.run is work and options.tier == "small":
        missing = [name for name in ("text", "held_out", "data_dir") if not getattr(options, name)]
        if missing:
            parser.error(f"--{missing[0].replace('_', '-')} is missing; see the example in --help")
    return options


def work(options: argparse.Namespace) -> None:
    """Measure every cell that has no result, in order.

    Raises:
        ConfigError, DataError: an input is missing, or a cell could not be measured.
    """
    if options.tier == "full":
        print(FULL, end="")
        return
    at_idle_priority()
    results = Results(options.results)
    make_shards(options)
    lab = Lab(options.folder, results, SMALL, options.text, options.data_dir)
    jobs = lab.jobs()
    cells = [cell for job in jobs for cell in job.cells]
    left = [cell for cell in cells if results.get(cell.name, cell.settings) is None]
    print(
        f"{len(cells) - len(left)} of {counted(len(cells), 'cell')} finished; {_left(left, 1.0)}",
        flush=True,
    )
    if options.list:
        for cell in left:
            print(f"  {cell.name}  about {duration(cell.seconds)}")
        return
    spent = estimated = 0.0
    for job in jobs:
        waiting = unfinished(job, results)
        if not waiting:
            continue
        print(
            f"{waiting[0].name}{f' and {len(waiting) - 1} more' if waiting[1:] else ''} …",
            flush=True,
        )
        start = time.monotonic()
        job.run(waiting)
        if unmade := unfinished(job, results):
            raise DataError(f"{unmade[0].name} was not measured; see {options.folder}")
        spent += time.monotonic() - start
        estimated += sum(cell.seconds for cell in waiting)
        left = [cell for cell in left if cell not in waiting]
        taken = duration(time.monotonic() - start)
        print(
            f"{len(cells) - len(left)}/{len(cells)}  took {taken}; "
            f"{_left(left, spent / estimated)}",
            flush=True,
        )
    print("all cells are finished; next: python tools/quality report")


def at_idle_priority() -> None:
    """Use only idle processor time; the processes started from here inherit this."""
    os.nice(19)
    with suppress(OSError):  # not every kernel or container allows it
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def unfinished(job: Job, results: Results) -> list[Cell]:
    """Return the cells of a job that have no result."""
    return [cell for cell in job.cells if results.get(cell.name, cell.settings) is None]


def _left(cells: list[Cell], pace: float) -> str:
    """Return how much is left, in words; `pace` is real seconds per estimated second."""
    if not cells:
        return "nothing is left"
    return (
        f"{counted(len(cells), 'cell')} left, about "
        f"{duration(pace * sum(cell.seconds for cell in cells))}"
    )


def make_shards(options: argparse.Namespace) -> None:
    """Make the shards that configs/quality.json names, if they are missing."""
    import json

    config = json.loads(CONFIG.read_text())
    for name, files in (("train", options.text), ("validation", [options.held_out])):
        folder = Path(config["data"][name])
        if manifest_path(folder).exists():
            _check_inputs(folder, files)
            continue
        command = [sys.executable, str(ROOT / "tools" / "make_shards.py"), *map(str, files)]
        command += ["--tokenizer", config["teacher"]["model"], "--output", str(folder.parent)]
        code = subprocess.run(
            [*command, "--sequence-length", str(config["data"]["sequence_length"])], check=False
        ).returncode
        if code:
            raise DataError(f"make_shards.py ended with exit code {code}; see its message above")


def _check_inputs(folder: Path, files: Sequence[Path]) -> None:
    """Check that shards were made from these files; bertdistiller reads the files themselves.

    Raises:
        DataError: they were made from others.
    """
    made_from = Manifest.load(folder).source.get("files")
    found = {Path(str(name)).name for name in made_from} if isinstance(made_from, list) else set()
    if found != {file.name for file in files}:
        raise DataError(
            f"{folder} was made from {', '.join(sorted(found)) or 'other data'}, found "
            f"{', '.join(file.name for file in files)} on the command line; name the same files, "
            f"or remove {folder.parent}"
        )


def report(options: argparse.Namespace) -> None:
    """Write the document's tables and pictures from the results."""
    from report import write_report

    tables = write_report(Results(options.results), options.document)
    print(f"written into {options.document}: {', '.join(tables)}")
