"""The experiments of docs/quality.md: distil the students, make those that they are compared with, measure, report.

Each command goes on where it stopped. In order, after the shards are made as docs/quality.md says:

  quality.py distil --runs students --tokens 10_000_000    long runs, of the first measured students
  quality.py undistilled                                   the same students as they were before distillation
  quality.py peer --text FILE … --tokens 10_000_000        bertdistiller's student, in an environment of its own
  quality.py glue --runs students --data-dir GLUE          fine-tune and score all of these
  quality.py distil --runs ablations --tokens 2_000_000    short runs, three seeds each
  quality.py yardstick                                     held-out relation loss of every student, the same for all
  quality.py glue --runs tap --data-dir GLUE               the downstream scores that "tap" is judged by
  quality.py report                                        tables and plots from what is finished
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaledistill.errors import ConfigError, DataError
from scaledistill.files import read_json, sha256_of, write_json

CONFIG = Path(__file__).parent.parent / "configs" / "quality.json"
LAUNCH = Path(__file__).parent.parent / "launch" / "distill.py"
NAME = "l3-h384"
# What differs from configs/quality.json: settings of the student, or whole keys.
STUDENTS: dict[str, dict[str, Any]] = {"teacher-init": {}, "random-init": {"init": "random"}}
ABLATIONS: dict[str, dict[str, Any]] = {
    "base": {},
    "random": {"init": "random"},
    "map-1-2-3": {"layer_map": [1, 2, 3]},
    "map-1-3-5": {"layer_map": [1, 3, 5]},
    "heads-12": {"relation_heads": 12},
    "heads-24": {"relation_heads": 24},
    "tap-extra": {"tap": "extra"},
    "dropout-0.1": {"dropout": 0.1},
}
YARDSTICK_HEADS = (12, 24, 48)
WARMUP_FRACTION = 0.1
# The same for all. CoLA has 8,551 training rows: only SST-2 is cut.
GLUE = {
    "tasks": "cola,sst2,mrpc,stsb,rte",
    "learning-rates": "1e-4",
    "epochs": "3",
    "seeds": "1,2,3",
    "max-train-rows": "8551",
}


def main() -> int:
    options = parse_arguments()
    try:
        return int(options.run(options) or 0)
    except (ConfigError, DataError) as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; rerun the same command to resume\n")
        return 130


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"), help="of all runs (default: %(default)s)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    distil = command("distil", distil_all, "distil students with our launcher")
    distil.add_argument("--runs", choices=("students", "ablations"), required=True)
    distil.add_argument("--only", nargs="+", metavar="NAME", help="some of them")
    distil.add_argument("--tokens", type=int, required=True, help="of each run")
    distil.add_argument("--seeds", type=int, nargs="+", help="(default: 1 for students, 1 2 3 for ablations)")
    distil.add_argument("--jobs", type=int, default=1, help="runs at a time, sharing the cores (default: %(default)s)")
    command("undistilled", write_undistilled, "write the students as they were before distillation")
    peer = command("peer", distil_peer, "distil bertdistiller's student from the same teacher and text")
    peer.add_argument("--text", type=Path, nargs="+", required=True, help=".txt or .txt.xz files")
    peer.add_argument("--tokens", type=int, required=True)
    peer.add_argument("--environment", type=Path, help="its virtual environment (default: made in the user's cache)")
    command("yardstick", measure_all, "measure the held-out relation loss of every student")
    glue = command("glue", score_all, "fine-tune and score what is finished")
    glue.add_argument("--runs", choices=("students", "tap"), required=True)
    glue.add_argument("--data-dir", type=Path, required=True, help="folder with the GLUE files")
    tell = command("report", report, "write tables and plots from what is finished")
    tell.add_argument("--document", type=Path, default=Path("docs/quality.md"), help="(default: %(default)s)")
    return parser.parse_args()


def settings() -> dict[str, Any]:
    return json.loads(CONFIG.read_text())


def steps_for(tokens: int) -> int:
    """Return the steps that at least so many tokens take."""
    config = settings()
    return -(-tokens // (config["train"]["global_batch_size"] * config["data"]["sequence_length"]))


def distil_all(options: argparse.Namespace) -> int:
    table = STUDENTS if options.runs == "students" else ABLATIONS
    names = options.only or list(table)
    if unknown := [name for name in names if name not in table]:
        raise ConfigError(f"--only: no run {unknown[0]!r}, expected some of {', '.join(table)}")
    seeds = options.seeds or ([1] if options.runs == "students" else [1, 2, 3])
    kind, steps = ("long" if options.runs == "students" else "short"), steps_for(options.tokens)
    # Seed by seed, so that every variant has one figure before the first has three.
    runs = [(options.folder / kind / f"{name}-seed{seed}", seed, table[name]) for seed in seeds for name in names]
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        codes = list(pool.map(lambda run: distil_one(run[0], run[1], run[2], steps, options.jobs), runs))
    return next((128 - code if code < 0 else code for code in codes if code), 0)


def distil_one(folder: Path, seed: int, changes: Mapping[str, Any], steps: int, jobs: int) -> int:
    """Distil into `folder`, or go on there; return the exit code."""
    overrides = {
        "run.folder": str(folder),
        "run.seed": seed,
        "train.max_steps": steps,
        "train.warmup_steps": int(WARMUP_FRACTION * steps),
        "train.validation_every_steps": max(1, steps // 5),
        **{f"students.{NAME}.{key}": value for key, value in changes.items()},
    }
    if is_done(folder, overrides):
        return 0
    words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in overrides.items()]
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    command = [
        sys.executable,
        str(LAUNCH),
        "--config",
        str(CONFIG),
        *(part for word in words for part in ("--set", word)),
    ]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        code = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
    sys.stderr.write(f"{folder.name}: {'done' if code == 0 else f'exit code {code}, see {log.name}'}\n")
    return code


def is_done(folder: Path, overrides: Mapping[str, Any]) -> bool:
    """Whether a run is done with these settings; one with others is launched, which says what differs."""
    status = read_json(folder / "status.json")
    if status is None or status["state"] != "done":
        return False
    done, asked = (_leaves(tree) for tree in (read_json(folder / "config.json") or {}, settings()))
    return all(done.get(key) == value for key, value in {**asked, **overrides}.items())


def _leaves(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return the settings of a configuration by their whole names."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _leaves(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


def write_undistilled(options: argparse.Namespace) -> None:
    from scaledistill.models.export import export_student
    from scaledistill.models.student import build_student, student_config
    from scaledistill.models.teacher import load_encoder

    config = settings()
    teacher = load_encoder(config["teacher"]["model"])
    spec = config["students"][NAME]
    sizes = {key: spec[key] for key in ("num_layers", "hidden_size", "num_attention_heads")}
    for name, changes in STUDENTS.items():
        init = changes.get("init", spec["init"])
        student = build_student(teacher, student_config(teacher.config, **sizes), init=init, seed=1)
        export_student(
            options.folder / "undistilled" / name / "export" / NAME,
            student.config,
            student.state_dict(),
            tokenizer_source=config["teacher"]["model"],
            card={"teacher": config["teacher"]["model"], "tokens": "0: not distilled", "init": init},
        )


def distil_peer(options: argparse.Namespace) -> int:
    from bench_peer import PeerError, default_environment, ready_python

    try:
        python = ready_python(options.environment or default_environment())
    except PeerError as error:
        raise DataError(str(error)) from None
    config, folder = settings(), options.folder / "peer"
    folder.mkdir(parents=True, exist_ok=True)
    spec = config["students"][NAME]
    write_json(
        folder / "spec.json",
        {
            "teacher": str(Path(config["teacher"]["model"]).resolve()),
            "text": [str(path.resolve()) for path in options.text],
            "output": str((folder / "export" / NAME).resolve()),
            "scratch": str((folder / "trainer").resolve()),
            "tokens": options.tokens,
            "sequence_length": config["data"]["sequence_length"],
            "batch_size": config["train"]["global_batch_size"],
            "learning_rate": config["train"]["learning_rate"],
            "warmup_fraction": WARMUP_FRACTION,
            "teacher_layer": config["teacher"]["layer"],
            "student": {key: spec[key] for key in ("num_layers", "hidden_size", "num_attention_heads")},
            "relation_heads": config["relations"]["num_heads"],
        },
    )
    worker = Path(__file__).with_name("quality_peer.py")
    return subprocess.run([python, str(worker), str(folder / "spec.json")], check=False).returncode


def measure_all(options: argparse.Namespace) -> None:
    """Write `yardsticks.json`: of each student, the mean relation loss of all held-out rows, by relation heads."""
    import torch

    from scaledistill.data.stream import ShardReader, iter_validation
    from scaledistill.models.capture import capture_qkv
    from scaledistill.models.teacher import Teacher, load_encoder
    from scaledistill.relations import relation_loss

    config, path = settings(), options.folder / "yardsticks.json"
    found = read_json(path) or {}
    students = {
        str(folder.parent.parent.relative_to(options.folder)): folder
        for folder in sorted(options.folder.glob(f"**/export/{NAME}"))
    }
    weights = {name: sha256_of(folder / "model.safetensors") for name, folder in students.items()}
    students = {
        name: folder
        for name, folder in students.items()
        if "tap-extra" not in name and found.get(name, {}).get("sha256") != weights[name]
    }
    if not students:
        return
    teacher = Teacher(load_encoder(config["teacher"]["model"]), config["teacher"]["layer"])
    models = {name: load_encoder(folder).eval() for name, folder in students.items()}
    sums = {name: dict.fromkeys(YARDSTICK_HEADS, 0.0) for name in models}
    held_out = ShardReader(config["data"]["validation"])
    rows = held_out.manifest.rows
    with torch.no_grad():
        for batch in iter_validation(held_out, rows=rows, micro_batch_size=64):
            target = teacher(batch.input_ids_BT, batch.mask_BT)
            for name, model in models.items():
                layer = model.config.num_hidden_layers
                qkv = capture_qkv(model, layer, input_ids=batch.input_ids_BT, attention_mask=batch.mask_BT)
                for heads in YARDSTICK_HEADS:
                    loss = relation_loss(
                        target, qkv, num_heads=heads, pairs=config["relations"]["pairs"], mask_BT=batch.mask_BT
                    )
                    sums[name][heads] += loss.total.item() * batch.weight / rows
    write_json(path, found | {name: {**by_heads, "sha256": weights[name]} for name, by_heads in sums.items()})
    for name, by_heads in sums.items():
        print(name, *(f"{heads} heads {loss:.5f}" for heads, loss in by_heads.items()), sep="  ")


def score_all(options: argparse.Namespace) -> int:
    """Fine-tune and score what is finished of the students, or of the runs that `tap` is judged by."""
    from scaledistill.glue.command import main as glue_main

    config, runs = settings(), options.folder
    seeds = GLUE["seeds"]
    if options.runs == "students":
        models = {"teacher": Path(config["teacher"]["model"])}
        for name in STUDENTS:
            models[name] = runs / "long" / f"{name}-seed1" / "export" / NAME
            models[f"{name}-undistilled"] = runs / "undistilled" / name / "export" / NAME
        models["bertdistiller"] = runs / "peer" / "export" / NAME
    else:
        seeds = "1"  # of the fine-tuning; those of the distillation are the repetitions
        models = {
            f"{name}-seed{seed}": runs / "short" / f"{name}-seed{seed}" / "export" / NAME
            for seed in (1, 2, 3)
            for name in ("base", "tap-extra")
        }
    if missing := [name for name, folder in models.items() if not (folder / "config.json").is_file()]:
        sys.stderr.write(f"not finished, left out: {', '.join(missing)}\n")
    models = {name: folder for name, folder in models.items() if name not in missing}
    values = GLUE | {"seeds": seeds, "data-dir": options.data_dir}
    values["output"] = runs / ("glue" if options.runs == "students" else "glue-tap")
    arguments = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    arguments += [part for name, folder in models.items() for part in ("--model", f"{name}={folder}")]
    return glue_main(["--group-by-length", *arguments])


def report(options: argparse.Namespace) -> None:
    from quality_report import write_report

    tables = write_report(options.folder, options.document, list(ABLATIONS), YARDSTICK_HEADS)
    print(f"written into {options.document}: {', '.join(tables) or 'nothing, no step is finished'}")


if __name__ == "__main__":
    sys.exit(main())
