"""The experiments of docs/quality.md: distil students, make those that they are compared with,
measure, report.

`run` works through what has no result yet, at idle priority beside other work, and goes on by the
same command; `report` writes docs/quality.md from the results in docs/quality/results.

Example: python tools/quality.py run --tier small --text corpus/wiki_en_train.txt.xz \\
           --held-out corpus/wiki_en_heldout.txt.xz --data-dir glue
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from quality_cells import CONFIG, SMALL, Cell, Job, Lab
from quality_results import Results

from scaledistill.errors import ConfigError, DataError, counted
from scaledistill.glue.listing import duration

ROOT = Path(__file__).parent.parent
FULL = """\
The tier "full" is MiniLMv2's published recipe: it takes GPUs for days, so it is these commands, for a cluster.

  python tools/make_shards.py --dataset wikimedia/wikipedia:20231101.en --tokenizer google-bert/bert-large-uncased \\
    --sequence-length 512 --held-out-fraction 0.001 --output shards/wikipedia
  deepspeed launch/distill.py --config configs/large_to_l6.json
  python tools/glue.py --model student=runs/large_to_l6/export/l6-h384 --model teacher=google-bert/bert-large-uncased \\
    --tasks mnli,qnli,qqp,rte,sst2,mrpc,cola,stsb --learning-rates 2e-5,5e-5,1e-4 --epochs 3,5,10 --seeds 1,2,3 \\
    --output runs/glue-full
  python tools/glue.py --model student=runs/large_to_l6/export/l6-h384 --tasks squad2 --output runs/squad-full
"""


def main() -> int:
    options = parse_arguments()
    # A job in a shell's background begins with SIGINT ignored.
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="work through what has no result yet")
    run.set_defaults(run=work)
    run.add_argument(
        "--tier",
        choices=("small", "full"),
        required=True,
        help="hours of two cores, or days of GPUs",
    )
    run.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="to distil on, as make_shards.py takes it",
    )
    run.add_argument("--held-out", type=Path, metavar="FILE", help="text that no student sees")
    run.add_argument("--data-dir", type=Path, metavar="DIR", help="folder with the GLUE files")
    run.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/quality"),
        help="of the work (default: %(default)s)",
    )
    run.add_argument(
        "--list", action="store_true", help="say what is left and how long it will take, and leave"
    )
    tell = commands.add_parser("report", help="write docs/quality.md from the results")
    tell.set_defaults(run=report)
    tell.add_argument(
        "--document", type=Path, default=ROOT / "docs" / "quality.md", help="(default: %(default)s)"
    )
    for command in (run, tell):
        command.add_argument(
            "--results",
            type=Path,
            default=ROOT / "docs" / "quality" / "results",
            help="(default: %(default)s)",
        )
    options = parser.parse_args()
    if options.run is work and options.tier == "small":
        missing = [name for name in ("text", "held_out", "data_dir") if not getattr(options, name)]
        if missing:
            parser.error(f"--{missing[0].replace('_', '-')} is missing; see the example in --help")
    return options


def work(options: argparse.Namespace) -> None:
    """Measure every cell that has no result, in order."""
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
    print("all cells are finished; next: python tools/quality.py report")


def at_idle_priority() -> None:
    """Take only what processor time nobody else wants; the commands started from here inherit
    it.
    """
    os.nice(19)
    with suppress(OSError):  # not every kernel or container lets us
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def unfinished(job: Job, results: Results) -> list[Cell]:
    """Return the cells of a job that have no result."""
    return [cell for cell in job.cells if results.get(cell.name, cell.settings) is None]


def _left(cells: list[Cell], pace: float) -> str:
    """Say how much is left, at so many real seconds for an estimated one."""
    if not cells:
        return "nothing is left"
    return (
        f"{counted(len(cells), 'cell')} left, about "
        f"{duration(pace * sum(cell.seconds for cell in cells))}"
    )


def make_shards(options: argparse.Namespace) -> None:
    """Make the shards that configs/quality.json names, where they are missing."""
    import json

    config = json.loads(CONFIG.read_text())
    for name, files in (("train", options.text), ("validation", [options.held_out])):
        folder = Path(config["data"][name])
        if any(folder.glob("*manifest*")):
            continue
        command = [sys.executable, str(ROOT / "tools" / "make_shards.py"), *map(str, files)]
        command += ["--tokenizer", config["teacher"]["model"], "--output", str(folder.parent)]
        code = subprocess.run(
            [*command, "--sequence-length", str(config["data"]["sequence_length"])], check=False
        ).returncode
        if code:
            raise DataError(f"make_shards.py left with exit code {code}; see its message above")


def report(options: argparse.Namespace) -> None:
    """Write the tables and pictures of the document from the results."""
    from quality_report import write_report

    tables = write_report(Results(options.results), options.document)
    print(f"written into {options.document}: {', '.join(tables)}")


if __name__ == "__main__":
    sys.exit(main())
