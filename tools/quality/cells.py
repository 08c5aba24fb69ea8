"""The experiments of docs/quality.md: their settings, their order, and how each is run.

Inputs: a tier, the data, the teacher. Outputs: jobs with their cells, the most useful ones for the
report first. A job measures those of its cells that have no result yet. Not handled here: storing
the results (`results`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from results import Results

from scaledistill.config.schema import EvaluationSettings
from scaledistill.data.tokenizer import load_tokenizer
from scaledistill.errors import ConfigError, DataError
from scaledistill.metrics.recorder import read_rows
from scaledistill.storage.files import read_json, sha256_of, write_json

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "quality.json"
LAUNCH = ROOT / "launch" / "distill.py"
NAME = "l3-h384"
TEACHER = "teacher"
STUDENTS: dict[str, dict[str, Any]] = {
    "teacher-init": {},
    "random-init": {"init": "random"},
    "tap-extra": {"tap": "extra"},
}
"""The differences from the student in configs/quality.json."""
UNDISTILLED = {"teacher-init-undistilled": "teacher", "random-init-undistilled": "random"}
"""The students that are not distilled, and their initialisation."""
PEER = "bertdistiller"
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(32 << 30)}
"""Make glibc keep freed memory: mapping the peer's attention maps anew, 100 MB each, takes half of
its time."""
ABLATIONS: dict[str, dict[str, Any]] = {
    "base": {},
    "random": {"init": "random"},
    "heads-12": {"relation_heads": 12},
    "map-last": {"layer_map": [4, 5, 6]},
    "tap-extra": {"tap": "extra"},
    "dropout-0.1": {"dropout": 0.1},
}
HELD_OUT_HEADS = (12, 48)
HELD_OUT_ROWS = 512
WARMUP_FRACTION = 0.1
MODELS = (
    *(
        "teacher",
        "teacher-init-undistilled",
        "teacher-init",
        "random-init-undistilled",
        "random-init",
    ),
    *("tap-extra", PEER),
)
"""The models, in the order in which they are made and listed in the tables."""


@dataclass(frozen=True)
class Tier:
    """How much computation the experiments may take."""

    student_tokens: int
    ablation_tokens: int
    seeds: tuple[int, ...]
    """Seeds of fine-tuning, and of the ablations' distillation."""
    glue: EvaluationSettings


SMALL = Tier(
    student_tokens=4_000_000,
    ablation_tokens=1_000_000,
    seeds=(1, 2, 3),
    glue=EvaluationSettings(
        tasks=["cola", "sst2", "mrpc", "stsb", "rte"],
        learning_rates=[1e-4],
        epochs=[3],
        seeds=[1],
        batch_size=16,
        max_train_rows=1000,
        group_by_length=True,
        scores_each_epoch=True,
    ),
)
# Seconds on two cores of an AMD EPYC with AVX2. The remaining time is estimated from these and from
# the actual times so far.
SECONDS_PER_MILLION = {"ours": 390.0, "peer": 800.0}
SECONDS_AROUND_A_RUN = 60.0
SECONDS_OF_FINE_TUNING = {"cola": 25.0, "sst2": 25.0, "mrpc": 60.0, "stsb": 45.0, "rte": 80.0}
TEACHER_FACTOR = 1.7


@dataclass(frozen=True)
class Cell:
    """One result: its name, and everything that decides it except the machine's arithmetic."""

    name: str
    settings: Mapping[str, Any]
    seconds: float
    """The estimated time."""


@dataclass(frozen=True)
class Job:
    """Cells that are measured together."""

    cells: tuple[Cell, ...]
    run: Callable[[list[Cell]], None]
    """Measures the given cells of the job, and stores each result as soon as it is there."""


class Lab:
    """Makes and measures the models: runs in progress in `folder`, finished cells in `results`."""

    def __init__(
        self, folder: Path, results: Results, tier: Tier, text: list[Path], glue_data: Path
    ) -> None:
        """Read the configuration, and check that the text, the GLUE data and the teacher exist.

        Raises:
            ConfigError, DataError: one of them is missing.
        """
        self.folder, self.results, self.tier = folder, results, tier
        self.config: dict[str, Any] = json.loads(CONFIG.read_text())
        self._text, self._glue_data = text, glue_data
        self._teacher = Path(self.config["teacher"]["model"])
        if not (self._teacher / "config.json").is_file():
            raise DataError(
                f"{self._teacher} is not a model; `make quickstart` downloads the teacher to it"
            )
        for path in (*text, glue_data):
            if not path.exists():
                raise ConfigError(f"{path} does not exist; docs/quality.md describes it")

    # What decides the results.

    @cached_property
    def _inputs(self) -> dict[str, str]:
        data = {name: rows_identity(self.config["data"][name]) for name in ("train", "validation")}
        return {"teacher": sha256_of(self._teacher / "model.safetensors"), **data}

    @cached_property
    def _glue_conditions(self) -> dict[str, Any]:
        from scaledistill.errors import Problems
        from scaledistill.glue.plan import plan_tasks

        problems = Problems()
        settings = self.tier.glue.model_copy(update={"data_folder": str(self._glue_data)})
        _, data = plan_tasks(settings, problems)
        problems.raise_all()
        return {task: asdict(each.conditions) for task, each in data.items()}

    def jobs(self) -> list[Job]:
        """Return all jobs of the tier, finished or not, in order."""
        jobs = [
            job
            for name in MODELS
            for job in (self._model_job(name), self._glue_job(name, self.tier.seeds[0]))
        ]
        for seed in self.tier.seeds:
            if seed != self.tier.seeds[0]:
                jobs += [self._glue_job(name, seed) for name in MODELS]
            jobs += [self._ablation_job(name, seed) for name in ABLATIONS]
        return jobs

    # Models.

    def _model_job(self, name: str) -> Job:
        cell = self._model_cell(name)

        def run(_: list[Cell]) -> None:
            start = time.monotonic()
            result = {**self._make(name), **self._measure(name, self._export_of(name))}
            self.results.put(cell.name, cell.settings, result, time.monotonic() - start)

        return Job((cell,), run)

    def _model_cell(self, name: str) -> Cell:
        tokens = self.tier.student_tokens
        settings = {"inputs": self._inputs, "held_out_rows": HELD_OUT_ROWS}
        million = tokens / 1e6
        if name == TEACHER:
            return Cell(f"models/{name}", settings, SECONDS_AROUND_A_RUN / 2)
        settings |= {"student": self.config["students"][NAME]}
        if name in UNDISTILLED:
            settings |= {"init": UNDISTILLED[name], "seed": 1}
            return Cell(f"models/{name}", settings, SECONDS_AROUND_A_RUN / 2)
        if name == PEER:
            settings |= {
                "tokens": tokens,
                "peer": self._peer_spec(),
                "text": sorted(map(sha256_of, self._text)),
            }
            return Cell(
                f"models/{name}",
                settings,
                SECONDS_AROUND_A_RUN + million * SECONDS_PER_MILLION["peer"],
            )
        settings |= {"tokens": tokens, **self._run_settings(tokens, 1, STUDENTS[name])}
        return Cell(
            f"models/{name}", settings, SECONDS_AROUND_A_RUN + million * SECONDS_PER_MILLION["ours"]
        )

    def _folder_of(self, cell: Cell) -> Path:
        """Return the folder for a cell's work; other settings have another folder."""
        return self.folder / f"{cell.name.replace('/', '-')}-{_hash(cell.settings)}"

    def _export_of(self, name: str) -> Path:
        """Return the folder of a model, whether it is made yet or not."""
        return (
            self._teacher
            if name == TEACHER
            else self._folder_of(self._model_cell(name)) / "export" / NAME
        )

    def _make(self, name: str) -> dict[str, Any]:
        """Make a model, or resume making it; return the figures of its training."""
        if name == TEACHER:
            return {}
        if name in UNDISTILLED:
            self._write_undistilled(name)
            return {}
        if name == PEER:
            return self._distil_peer()
        settings = self._run_settings(self.tier.student_tokens, 1, STUDENTS[name])
        return self._distil(self._folder_of(self._model_cell(name)), settings["overrides"])

    def _run_settings(self, tokens: int, seed: int, changes: Mapping[str, Any]) -> dict[str, Any]:
        train = self.config["train"]
        steps = math.ceil(
            tokens / (train["global_batch_size"] * self.config["data"]["sequence_length"])
        )
        overrides = {
            "run.seed": seed,
            "train.max_steps": steps,
            "train.warmup_steps": int(WARMUP_FRACTION * steps),
            "train.validation_every_steps": math.ceil(
                steps / (8 if tokens == self.tier.student_tokens else 2)
            ),
            **{f"students.{NAME}.{key}": value for key, value in changes.items()},
        }
        return {"overrides": overrides, "relations": self.config["relations"], "train": train}

    def _distil(self, folder: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Distil into `folder` with our launcher, or resume there; return the learning curve."""
        wanted = {
            **overrides,
            "run.folder": str(folder),
            "evaluation.probe": "stsb",
            "evaluation.data_folder": str(self._glue_data),
        }
        words = [
            f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in wanted.items()
        ]
        command = [sys.executable, str(LAUNCH), "--config", str(CONFIG)]
        self._call([*command, *(part for word in words for part in ("--set", word))], folder)
        rows = [
            row
            for row in read_rows(folder / "metrics.jsonl")
            if row.get("validation_loss") is not None
        ]
        tokens = self.config["train"]["global_batch_size"] * self.config["data"]["sequence_length"]
        keys = ("validation_loss", "probe/stsb_spearman", "probe/stsb_spearman_below")
        curve = [
            {"tokens": row["step"] * tokens, **{key: row[key] for key in keys}} for row in rows
        ]
        return {"curve": curve, "steps": overrides["train.max_steps"]}

    def _call(
        self, command: list[str], folder: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        """Run a command with its output in `<folder>.log`, and with more environment variables.

        If this process is stopped, it stops the command too and waits up to a minute for it.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        path = folder.with_name(f"{folder.name}.log")
        with path.open("a") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
            # Linux shares the processor among sessions before niceness counts.
            with suppress(OSError):
                Path(f"/proc/{process.pid}/autogroup").write_text("19")
            try:
                code = process.wait()
            except BaseException:
                process.terminate()  # our launcher saves a checkpoint on SIGTERM
                with suppress(subprocess.TimeoutExpired):
                    process.wait(60)
                process.kill()
                process.wait()
                raise
        if code:
            tail = " ".join(path.read_text(errors="replace").strip().splitlines()[-1:])
            raise DataError(f"{folder.name} failed with exit code {code}, see {path}: {tail}")

    def _write_undistilled(self, name: str) -> None:
        from scaledistill.models.export import export_student
        from scaledistill.models.student import build_student, student_config
        from scaledistill.models.teacher import load_encoder

        teacher, spec = load_encoder(self._teacher), self.config["students"][NAME]
        sizes = {key: spec[key] for key in ("num_layers", "hidden_size", "num_attention_heads")}
        student = build_student(
            teacher, student_config(teacher.config, **sizes), init=UNDISTILLED[name], seed=1
        )
        export_student(
            self._export_of(name),
            student.config,
            student.state_dict(),
            tokenizer_source=self._teacher,
            card={
                "teacher": str(self._teacher),
                "tokens": "0: not distilled",
                "init": UNDISTILLED[name],
            },
        )

    def _peer_spec(self) -> dict[str, Any]:
        config, spec = self.config, self.config["students"][NAME]
        return {
            "tokens": self.tier.student_tokens,
            "sequence_length": config["data"]["sequence_length"],
            "batch_size": config["train"]["global_batch_size"],
            "learning_rate": config["train"]["learning_rate"],
            "warmup_fraction": WARMUP_FRACTION,
            "teacher_layer": config["teacher"]["layer"],
            "student": {
                key: spec[key] for key in ("num_layers", "hidden_size", "num_attention_heads")
            },
            "relation_heads": config["relations"]["num_heads"],
        }

    def _distil_peer(self) -> dict[str, Any]:
        sys.path.append(str(ROOT / "tools" / "bench"))
        from peer import PeerError, default_environment, ready_python

        folder, export = self._folder_of(self._model_cell(PEER)), self._export_of(PEER)
        try:
            python = ready_python(default_environment())
        except PeerError as error:
            raise DataError(str(error)) from None
        folder.mkdir(parents=True, exist_ok=True)
        paths = {"teacher": self._teacher, "output": export, "scratch": folder / "trainer"}
        spec = {key: str(path.resolve()) for key, path in paths.items()} | self._peer_spec()
        write_json(
            folder / "spec.json", spec | {"text": [str(path.resolve()) for path in self._text]}
        )
        worker = Path(__file__).with_name("distil_peer.py")
        self._call([str(python), str(worker), str(folder / "spec.json")], folder, KEEP_MEMORY)
        facts = read_json(export / "facts.json")
        if facts is None:
            raise DataError(
                f"{export}/facts.json cannot be read; delete {export} and rerun the same command"
            )
        return {key: facts[key] for key in ("steps", "tokens", "rows", "mean_tokens_per_row")}

    def _measure(self, name: str, export: Path) -> dict[str, Any]:
        """Return a finished model's probe and held-out losses."""
        from scaledistill.glue.probe import SimilarityProbe
        from scaledistill.models.teacher import load_encoder

        model = load_encoder(export)
        scores = SimilarityProbe(load_tokenizer(export), self._glue_data).score(model)
        result: dict[str, Any] = {
            "probe": scores,
            "weights_sha256": sha256_of(export / "model.safetensors"),
        }
        # With tap "extra" the export lacks the projection whose Q, K and V were trained.
        if name != TEACHER and "tap-extra" not in name:
            result["held_out_loss"] = self._held_out_loss(model)
        return result

    def _held_out_loss(self, model: Any) -> dict[str, float]:
        """Return the mean relation loss on held-out rows, by number of relation heads.

        It is the same measure for all students, whatever heads they were trained with.
        """
        import torch

        from scaledistill.data.stream import ShardReader, iter_validation
        from scaledistill.models.teacher import Teacher, load_encoder
        from scaledistill.models.view import capture_qkv
        from scaledistill.relations import relation_loss

        teacher = Teacher(load_encoder(self._teacher), self.config["teacher"]["layer"])
        sums = dict.fromkeys(HELD_OUT_HEADS, 0.0)
        held_out = ShardReader(self.config["data"]["validation"])
        pairs, layer = self.config["relations"]["pairs"], model.config.num_hidden_layers
        with torch.no_grad():
            for batch in iter_validation(held_out, rows=HELD_OUT_ROWS, micro_batch_size=64):
                target = teacher(batch.tokens)
                qkv = capture_qkv(
                    model, layer, input_ids=batch.input_ids_BT, attention_mask=batch.mask_BT
                )
                for heads in HELD_OUT_HEADS:
                    loss = relation_loss(
                        target, qkv, num_heads=heads, pairs=pairs, mask_BT=batch.mask_BT
                    )
                    sums[heads] += loss.total.item() * batch.weight / HELD_OUT_ROWS
        return {str(heads): loss for heads, loss in sums.items()}

    # Ablations.

    def _ablation_job(self, name: str, seed: int) -> Job:
        tokens, changes = self.tier.ablation_tokens, ABLATIONS[name]
        settings = {
            "inputs": self._inputs,
            "held_out_rows": HELD_OUT_ROWS,
            "student": self.config["students"][NAME],
            "tokens": tokens,
            **self._run_settings(tokens, seed, changes),
        }
        seconds = SECONDS_AROUND_A_RUN + tokens / 1e6 * SECONDS_PER_MILLION["ours"]
        cell = Cell(f"ablations/{name}-seed{seed}", settings, seconds)

        def run(_: list[Cell]) -> None:
            start, folder = time.monotonic(), self._folder_of(cell)
            training = self._distil(folder, settings["overrides"])
            result = {**training, **self._measure(name, folder / "export" / NAME)}
            self.results.put(cell.name, cell.settings, result, time.monotonic() - start)

        return Job((cell,), run)

    # Fine-tuning.

    def _glue_job(self, name: str, seed: int) -> Job:
        glue, model = self.tier.glue, self._model_cell(name)
        factor = TEACHER_FACTOR if name == TEACHER else 1.0
        cells = tuple(
            Cell(
                f"glue/{name}/{task}-seed{seed}",
                {
                    "model": _hash(model.settings),
                    "task": task,
                    "seed": seed,
                    "learning_rate": glue.learning_rates[0],
                    "epochs": glue.epochs[0],
                    "conditions": self._glue_conditions[task],
                },
                factor * SECONDS_OF_FINE_TUNING[task],
            )
            for task in glue.tasks
        )
        return Job(cells, lambda waiting: self._fine_tune(name, seed, waiting))

    def _fine_tune(self, name: str, seed: int, waiting: list[Cell]) -> None:
        from scaledistill.glue.cell import read_record
        from scaledistill.glue.grid import Update, run_grid

        # Results are kept in git but weights are not, so the model may have to be made again.
        if not (self._export_of(name) / "config.json").is_file():
            self._make(name)
        output = self._folder_of(self._model_cell(name)) / "glue"
        cells = {cell.settings["task"]: cell for cell in waiting}
        settings = self.tier.glue.model_copy(
            update={"data_folder": str(self._glue_data), "seeds": [seed], "tasks": list(cells)}
        )

        def keep(update: Update) -> None:
            if update.state == "finished" and (record := read_record(update.cell, output)):
                cell = cells[update.cell.task]
                if self.results.get(cell.name, cell.settings) is None:
                    keys = (
                        "scores",
                        "majority_scores",
                        "only_answer",
                        "epochs",
                        "train_rows",
                        "dev_rows",
                    )
                    self.results.put(
                        cell.name,
                        cell.settings,
                        {key: record[key] for key in keys}
                        | {
                            "precision": record["precision"],
                            "model_sha256": update.cell.model_sha256,
                        },
                        record["seconds"],
                    )
                    print(f"  {cell.name}  {update.text}", flush=True)

        models = {name: str(self._export_of(name))}
        result = run_grid(models, settings, output, on_update=keep)
        # Cells that an interrupted run fine-tuned without storing their results.
        for finished in result.finished:
            keep(Update(finished, "finished", 1.0, "found finished"))
        if result.failures:
            cell_, error = next(iter(result.failures.items()))
            raise DataError(f"{cell_.title} failed: {error}")


def rows_identity(shards: str) -> str:
    """Return a hash of the rows in a folder of shards, wherever their text and tokenizer lay.

    The manifest's own hash covers the paths of both, which differ from machine to machine.
    """
    from scaledistill.data.stream import ShardReader

    manifest = ShardReader(shards).manifest
    content = {
        "sequence_length": manifest.sequence_length,
        "shards": [shard.sha256 for shard in manifest.shards],
    }
    return _sha256(content)


def _sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hash(settings: Mapping[str, Any]) -> str:
    return _sha256(settings)[:8]
