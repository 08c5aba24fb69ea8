"""Measure a whole optimizer step, and compare it with bertdistiller's.

A step consists of data, teacher, student, loss, backward, clipping and AdamW. Teacher and student
have random weights: the teacher of BERT-large's shape, the student of the configuration's. Both
sides start from the same files and get the same tokens in the same order; each is a separate
process, and they step in turn. bertdistiller runs in a virtual environment that this tool creates,
as released (fp32) and under bf16 autocast. Exit code 3 if it could not be measured; our figures are
reported in any case.

With --students it measures instead what several students gain from one pass of the teacher: the
step of all of them over the sum of each one's own step, in one process, in turn, with the same
teacher and the same engines.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peer import VARIANTS, PeerError, default_environment, ready_python

from scaledistill.metrics.benchmark import (
    Report,
    Turns,
    Worker,
    WorkerError,
    add_options,
    in_turn,
    ratios,
)

if TYPE_CHECKING:
    from scaledistill.config.schema import DistillConfig

ROOT = Path(__file__).parents[2]
PEER_SCRIPT = str(Path(__file__).with_name("peer.py"))
VOCABULARY = 30_522
DATA_STEPS = 16
"""Steps until the rows repeat."""


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def option(name: str, text: str, **settings: Any) -> None:
        parser.add_argument(name, help=text, **settings)

    option(
        "--shape",
        "sequences x tokens per step; repeatable (default: 8x128 and 2x512, on a GPU 256x128 and "
        "256x512)",
        type=_shape,
        action="append",
        metavar="BxT",
        dest="shapes",
    )
    option(
        "--teacher",
        "the teacher's layers x width (default: 24x1024)",
        type=_shape,
        default=(24, 1024),
        metavar="LxD",
    )
    option(
        "--config",
        "the other settings (default: configs/large_to_l6.json)",
        type=Path,
        default=ROOT / "configs" / "large_to_l6.json",
        metavar="FILE",
    )
    option(
        "--set",
        "override one of them; repeatable",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
    )
    option(
        "--teacher-dtype",
        "ours: precision of the teacher (default: %(default)s)",
        default="auto",
        metavar="DTYPE",
    )
    option(
        "--precision",
        "ours: precision of the student (default: %(default)s)",
        default="auto",
        metavar="DTYPE",
    )
    option(
        "--warmup",
        "unmeasured steps per side (default: %(default)s)",
        type=int,
        default=2,
        metavar="N",
    )
    option("--rounds", "measured rounds (default: 5, on a GPU 20)", type=int, metavar="N")
    option(
        "--max-seconds",
        "a side stops measuring a shape after S seconds (default: 120)",
        type=float,
        default=120,
        metavar="S",
    )
    option(
        "--students",
        "measure students of these layers x width together and alone, without bertdistiller "
        "(default shape: 4x128, on a GPU 64x128); the first two are also measured as a pair",
        type=_sizes,
        metavar="LxD,LxD,...",
    )
    option("--no-peer", "measure without bertdistiller", action="store_true")
    option(
        "--peer-venv",
        "bertdistiller's virtual environment, created if missing (default: "
        f"{default_environment()})",
        type=Path,
        default=default_environment(),
        metavar="DIR",
    )
    option(
        "--peer-micro-batch",
        "bertdistiller accumulates over micro-batches of N (default: the whole batch)",
        type=int,
        metavar="N",
    )
    option("--folder", "create the temporary models and shards here", type=Path, metavar="DIR")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    add_options(parser)
    options = parser.parse_args()
    if options.students and len(options.shapes or []) > 1:
        parser.error("--students measures one --shape")
    return options


def _sizes(text: str) -> list[tuple[int, int]]:
    sizes = [_shape(each) for each in text.split(",")]
    if len(set(sizes)) < max(2, len(sizes)):
        raise argparse.ArgumentTypeError(
            f"{text!r}; expected two or more different sizes such as 6x384,12x384"
        )
    return sizes


def _shape(text: str) -> tuple[int, int]:
    first, _, second = text.partition("x")
    if not (first.isdecimal() and second.isdecimal() and int(first) and int(second)):
        raise argparse.ArgumentTypeError(f"{text!r}; expected two numbers such as 8x128")
    return int(first), int(second)


def main() -> int:
    """Measure, publish the report and return the exit code."""
    options = parse_arguments()
    if options.worker:
        return (make_student_steps if options.students else make_steps)(options.worker)

    import torch

    from scaledistill.errors import EXIT_CONFIG, EXIT_DONE, EXIT_ENVIRONMENT, ConfigError
    from scaledistill.metrics.stopwatch import PHASES, measured_matrix_rate

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    device = torch.device("cuda" if gpu else "cpu")
    if not gpu:
        # DeepSpeed warns if it has to detect that itself.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if options.students:
        options.shapes = options.shapes or [(64 if gpu else 4, 128)]
    options.shapes = options.shapes or ([(256, 128), (256, 512)] if gpu else [(8, 128), (2, 512)])
    options.rounds = options.rounds or (20 if gpu else 5)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    result = Result(
        {name: measured_matrix_rate(device, dtype) for name, dtype in dtypes.items()}, PHASES
    )
    problems: list[str] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, python = Path(name), None
        try:
            write_models(options, folder)
            try:
                without_peer = options.no_peer or options.students
                python = None if without_peer else ready_python(options.peer_venv)
            except PeerError as error:
                problems.append(str(error))
            for shape in options.shapes:
                if options.students:
                    result.add_students(shape, measure_students(options, shape, folder))
                else:
                    result.add(shape, measure(options, shape, folder, python, problems))
        except ConfigError as error:
            print(f"ERROR {error}", file=sys.stderr)
            return EXIT_CONFIG
        except WorkerError as error:
            problems.append(str(error))
    result.report.publish(options, gpu=gpu)
    for problem in problems:
        print(f"ERROR {problem}", file=sys.stderr)
    return EXIT_ENVIRONMENT if problems else EXIT_DONE


def configure(options: argparse.Namespace, folder: Path, shape: tuple[int, int]) -> DistillConfig:
    """Return the file's configuration for a shape, with our models and rows."""
    from scaledistill.config.load import load_config

    [student] = load_config(options.config, options.overrides).students
    B, T = shape
    ours = {
        "run.folder": folder / "run",
        "teacher.model": folder / "teacher",
        "teacher.dtype": options.teacher_dtype,
        f"students.{student}.init": folder / "student",
        "data.train": folder / f"rows-{T}",
        "data.sequence_length": T,
        "data.num_lanes": 1,
        "data.validation": "null",
        "train.validation_every_steps": 0,
        "train.global_batch_size": B,
        "train.precision": options.precision,
    }
    # The presets' micro-batch of 32 is refused for a smaller batch.
    micro = f"train.micro_batch_size={min(B, 32)}"
    return load_config(
        options.config,
        [micro, *options.overrides, *(f"{key}={value}" for key, value in ours.items())],
    )


def write_models(options: argparse.Namespace, folder: Path) -> None:
    """Write a random teacher and a random student.

    They have no dropout, since bertdistiller would apply it and we do not.
    """
    import torch
    from transformers import BertConfig

    from scaledistill.models.architectures import build_encoder
    from scaledistill.models.teacher import quiet_transformers
    from scaledistill.preflight.checks import student_shape

    config = configure(options, folder, options.shapes[0])
    [student] = config.students
    num_layers, width = options.teacher
    teacher = BertConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=num_layers,
        hidden_size=width,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
        max_position_embeddings=max(512, *(T for _, T in options.shapes)),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    with quiet_transformers():
        build_encoder(teacher).save_pretrained(folder / "teacher")
        build_encoder(student_shape(config, student, teacher)).save_pretrained(folder / "student")


def write_rows(config: DistillConfig, tokens_file: Path) -> None:
    """Write shards of random tokens, and the same rows in our order for bertdistiller."""
    import numpy as np

    from scaledistill.data.shards import ShardWriter
    from scaledistill.data.stream import ShardReader, ShardStream

    [source] = config.data.sources.values()
    folder, B, T = (
        Path(source.shards),
        config.train.global_batch_size,
        config.data.sequence_length,
    )
    tokenizer = {"name": "synthetic", "sha256": "0" * 64}
    rows = B * DATA_STEPS
    ids_NT = np.random.default_rng(0).integers(0, VOCABULARY, (rows, T), np.uint16)
    documents = np.array([(row, 0, T) for row in range(rows)])
    with ShardWriter(
        folder,
        sequence_length=T,
        vocab_size=VOCABULARY,
        tokenizer=tokenizer,
        pad_token_id=0,
        overwrite=True,
    ) as writer:
        writer.write(ids_NT, documents)
    shards = ShardReader(folder)
    order = shards.order(
        seed=config.run.seed, num_lanes=config.data.num_lanes, window_rows=config.data.window_rows
    )
    with ShardStream(shards, order, global_batch_size=B, micro_batch_size=B) as stream:
        np.save(
            tokens_file,
            np.concatenate([next(stream).input_ids_BT.numpy() for _ in range(DATA_STEPS)]),
        )


def peer_settings(
    options: argparse.Namespace, config: DistillConfig, folder: Path, bf16: bool
) -> dict[str, Any]:
    """Return the settings of the same run for bertdistiller."""
    [(name, student)], train = config.students.items(), config.train
    micro = min(options.peer_micro_batch or train.global_batch_size, train.global_batch_size)
    arguments = {
        "output_dir": str(folder / "peer"),
        "bf16": bf16,
        "teacher_layer": config.teacher.layer,
        "student_layer": student.num_layers,
        "student_hidden_size": student.hidden_size,
        "student_attention_heads": student.num_attention_heads,
        "num_relation_heads": config.relation_heads(name),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": train.global_batch_size // micro,
        "learning_rate": train.learning_rate,
        "warmup_steps": train.warmup_steps,
        "weight_decay": train.weight_decay,
        "adam_beta1": train.adam_betas[0],
        "adam_beta2": train.adam_betas[1],
        "adam_epsilon": train.adam_epsilon,
        "max_grad_norm": train.max_grad_norm,
    }
    relations = [
        (*("qkv".index(letter) + 1 for letter in pair), w)
        for pair, w in config.relations.pairs.items()
    ]
    models = {name: str(folder / name) for name in ("teacher", "student")}
    return {
        **models,
        "tokens": str(folder / "tokens.npy"),
        "arguments": arguments,
        "relations": relations,
    }


class Side:
    """One side of the comparison: its process and the report of each step."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.answers: list[dict[str, Any]] = []
        self.seconds: list[float] = []
        """Seconds of the measured rounds."""

    def step(self) -> float:
        """Run one step and return its seconds."""
        self.answers.append(self._worker.turn())
        return self.answers[-1]["seconds"]


def measure(
    options: argparse.Namespace,
    shape: tuple[int, int],
    folder: Path,
    python: Path | None,
    problems: list[str],
) -> dict[str, Side]:
    """Let all sides step in turn and return them by name.

    If bertdistiller fails in its first step, it is left out and `problems` gets the reason.
    """
    config = configure(options, folder, shape)
    write_rows(config, folder / "tokens.npy")
    settings: dict[str, Any] = {"ours": config.model_dump()}
    if python:
        settings |= {
            name: peer_settings(options, config, folder, bf16) for name, bf16 in VARIANTS.items()
        }
    environment = worker_environment()
    title = f"{shape[0]}x{shape[1]}"
    sides: dict[str, Side] = {}
    with ExitStack() as stack:
        for name, content in settings.items():
            file = folder / f"{name}.json"
            file.write_text(json.dumps(content))
            print(f"{title}: starting {name}", file=sys.stderr)
            command = (
                [sys.executable, __file__, "--worker"]
                if name == "ours"
                else [str(python), "-E", PEER_SCRIPT]
            )
            log = folder / f"{name}.log"
            worker = Worker(
                f"{title} {name}", [*command, str(file)], log=log, environment=environment
            )
            side = Side(stack.enter_context(worker))
            try:
                side.step()
                sides[name] = side
            except WorkerError as error:
                if name == "ours":
                    raise
                problems.append(str(error))
        runs = {name: side.step for name, side in sides.items()}
        in_turn(
            runs,
            rounds=options.warmup - 1,
            max_seconds=options.max_seconds,
            title=f"{title} warm-up",
        )
        seconds = in_turn(runs, rounds=options.rounds, max_seconds=options.max_seconds, title=title)
        for name, side in sides.items():
            side.seconds = seconds[name]
    return sides


def worker_environment() -> dict[str, str]:
    """Return the environment of the workers: the same number of threads for all, and one GPU."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    threads = str(len(os.sched_getaffinity(0)))
    return {"OMP_NUM_THREADS": threads, **os.environ, "CUDA_VISIBLE_DEVICES": gpu}


def measure_students(
    options: argparse.Namespace, shape: tuple[int, int], folder: Path
) -> list[dict[str, float]]:
    """Return the seconds of each round's steps: of "all" students, the first "two", and each."""
    from scaledistill.config.schema import StudentSettings

    config = configure(options, folder, shape)
    students = {
        f"l{num_layers}-h{width}": StudentSettings(
            num_layers=num_layers,
            hidden_size=width,
            num_attention_heads=12 if width % 12 == 0 else max(1, width // 64),
        )
        for num_layers, width in options.students
    }
    config = config.model_copy(update={"students": students})
    write_rows(config, folder / "tokens.npy")
    file = folder / "students.json"
    file.write_text(config.to_json())
    title = f"{shape[0]}x{shape[1]} {len(students)} students"
    sizes = ",".join(f"{num_layers}x{width}" for num_layers, width in options.students)
    command = [sys.executable, __file__, "--students", sizes, "--worker", str(file)]
    log = folder / "students.log"
    rounds: list[dict[str, float]] = []
    with Worker(title, command, log=log, environment=worker_environment()) as worker:

        def turn() -> float:
            rounds.append(worker.turn()["seconds"])
            steps = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in rounds[-1].items())
            print(f"{title}: {steps}", file=sys.stderr)
            return sum(rounds[-1].values())

        limit = options.max_seconds
        in_turn({"steps": turn}, rounds=options.warmup, max_seconds=limit, title=f"{title} warm-up")
        rounds.clear()
        in_turn({"steps": turn}, rounds=options.rounds, max_seconds=limit, title=title)
    return rounds


class Result:
    """The figures and tables of all shapes."""

    def __init__(self, matrix_rates: dict[str, float], phases: Sequence[str]) -> None:
        self.report = Report()
        self._rates = matrix_rates
        for dtype, rate in matrix_rates.items():
            self.report.add(f"machine/matrix_rate_{dtype}", rate, "FLOP/s")
        shape = "sequences x tokens"
        self._sides = self.report.table(
            "Whole optimizer step, medians",
            (shape, "side", "tokens/s", "ours as fast", "peak memory", "rounds"),
        )
        rates = [f"{dtype}: {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in matrix_rates.items()]
        self._machine = self.report.table(
            "Ours beside the machine: needed FLOP/s over a measured matrix rate",
            (shape, "teacher, student", "GFLOP a token", *rates),
        )
        self._phases = self.report.table("Ours: shares of the step", (shape, *phases))
        self._students = self.report.table(
            "Several students of one pass of the teacher, medians",
            (shape, "students", "together", "alone, in sum", "together / alone", "rounds"),
        )

    def add(self, shape: tuple[int, int], sides: dict[str, Side]) -> None:
        """Add the measurements of one shape."""
        label, ours = f"{shape[0]}x{shape[1]}", sides["ours"]

        def figure(name: str, values: float | Sequence[float], unit: str) -> float:
            return self.report.add(f"step/{label}/{name}", values, unit)

        for name, side in sides.items():
            prefix = "" if side is ours else f"{name}_"
            rates = [shape[0] * shape[1] / seconds for seconds in side.seconds]
            rate = figure(f"{prefix}tokens_per_second", rates, "tokens/s")
            peak = figure(
                f"{prefix}peak_memory_bytes", side.answers[-1]["peak_memory_bytes"], "bytes"
            )
            speedup = ""
            if side is not ours:
                speedup = (
                    f"{figure(f'speedup_vs_{name}', ratios(side.seconds, ours.seconds), 'x'):.2f}x"
                )
                losses = [answers[0]["loss"] for answers in (ours.answers, side.answers)]
                figure(f"loss_difference_to_{name}", abs(losses[0] / losses[1] - 1), "fraction")
            self._sides.rows.append(
                (
                    label,
                    name,
                    f"{rate:,.0f}",
                    speedup,
                    f"{peak / 1e9:.2f} GB",
                    str(len(side.seconds)),
                )
            )
        last = ours.answers[-1]
        dtype, needed = last["teacher_dtype"], last["flops_per_token"]
        flops = [needed * shape[0] * shape[1] / seconds for seconds in ours.seconds]
        mfu = {of: [each / rate for each in flops] for of, rate in self._rates.items()}
        if dtype in mfu:
            figure("mfu", mfu[dtype], "fraction")
        shares = [f"{figure(f'mfu_{of}', values, 'fraction'):.1%}" for of, values in mfu.items()]
        self._machine.rows.append(
            (label, f"{dtype}, {last['precision']}", f"{needed / 1e9:.3f}", *shares)
        )
        shares = []
        for phase in last["phases"]:
            values = [
                answer["phases"][phase] / answer["seconds"]
                for answer in ours.answers[-len(ours.seconds) :]
            ]
            shares.append(
                f"{figure(f'{phase}_fraction'.replace(' ', '_'), values, 'fraction'):.1%}"
            )
        self._phases.rows.append((label, *shares))

    def add_students(self, shape: tuple[int, int], rounds: Sequence[dict[str, float]]) -> None:
        """Add the measurements of `measure_students`."""
        names = [name for name in rounds[0] if name not in ("all", "two")]
        self.report.add("step/students/count", len(names), "students")
        groups = {"all": ("step/students", names)}
        if "two" in rounds[0]:
            groups["two"] = ("step/students/first_two", names[:2])
        for label, (prefix, members) in groups.items():
            together = [seconds[label] for seconds in rounds]
            alone = [sum(seconds[name] for name in members) for seconds in rounds]
            ratio = self.report.add(
                f"{prefix}/joint_over_separate", ratios(together, alone), "fraction"
            )
            figures = [
                self.report.add(f"{prefix}/{what}_seconds", seconds, "s")
                for what, seconds in (("joint", together), ("separate", alone))
            ]
            self._students.rows.append(
                (
                    f"{shape[0]}x{shape[1]}",
                    ", ".join(members),
                    *(f"{seconds:.2f} s" for seconds in figures),
                    f"{ratio:.2f}",
                    str(len(rounds)),
                )
            )


def make_student_steps(file: Path) -> int:
    """Run as the worker of `measure_students`: in each turn a step of each group of students."""
    turns = Turns()

    from dataclasses import replace

    from scaledistill.config.load import load_config
    from scaledistill.distributed.ranks import process_group
    from scaledistill.metrics.stopwatch import Stopwatch
    from scaledistill.preflight.resolve import resolve
    from scaledistill.training.session import open_session
    from scaledistill.training.step import train_step

    config = load_config(file)
    with process_group(config.run.timeout_seconds) as ranks:
        session = open_session(resolve(config, ranks.world_size, ranks.device), ranks, resume=False)
        groups = {"all": session.students}
        if len(session.students) > 2:
            groups["two"] = session.students[:2]
        groups |= {student.name: [student] for student in session.students}
        # The session of a run with some of the students, which shares the teacher and the engines.
        sessions = {name: replace(session, students=students) for name, students in groups.items()}
        watch = Stopwatch(ranks.device)
        with session.stream() as stream:
            while True:
                turns.wait()
                seconds = {}
                for name, part in sessions.items():
                    watch.lap()
                    train_step(part, stream, lambda: None, watch)
                    seconds[name] = watch.lap().seconds
                turns.answer(seconds=seconds)


def make_steps(file: Path) -> int:
    """Run as our side's worker: the real session, one step per turn."""
    turns = Turns()

    from scaledistill.config.load import load_config
    from scaledistill.distributed.ranks import process_group
    from scaledistill.metrics.stopwatch import Stopwatch, memory_peak_bytes
    from scaledistill.preflight.resolve import resolve
    from scaledistill.training.session import open_session
    from scaledistill.training.step import train_step

    config = load_config(file)
    with process_group(config.run.timeout_seconds) as ranks:
        session = open_session(resolve(config, ranks.world_size, ranks.device), ranks, resume=False)
        watch = Stopwatch(ranks.device)
        with session.stream() as stream:
            while True:
                turns.wait()
                watch.lap()
                result = train_step(session, stream, lambda: None, watch)
                lap = watch.lap()
                turns.answer(
                    seconds=lap.seconds,
                    phases=lap.phases,
                    loss=result.loss,
                    peak_memory_bytes=memory_peak_bytes(ranks.device),
                    flops_per_token=session.flops_per_token,
                    teacher_dtype=session.config.teacher.dtype,
                    precision=session.config.train.precision,
                )


if __name__ == "__main__":
    sys.exit(main())
