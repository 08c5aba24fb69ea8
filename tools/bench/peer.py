"""bertdistiller for tools/bench/step.py: its virtual environment, and its trainer as a worker.

bertdistiller needs transformers < 5, hence its own environment, in which this file runs as the
worker. The worker runs its `MiniLMTrainer` under `Trainer.train` without logging or saving. One
turn is one pass of that loop, from fetching the batch to the end of the optimizer step.
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

VERSION = "0.1.1"
VARIANTS = {"bertdistiller": False, "bertdistiller_bf16": True}
"""By the name in the figures, whether it runs under bf16 autocast."""
QUERY = (
    "from importlib.metadata import version as v; print(*map(v, ('bertdistiller', 'torch', "
    "'transformers')))"
)


class PeerError(RuntimeError):
    """bertdistiller cannot be measured here."""


def our_torch() -> str:
    """Return our torch's version without its build; bertdistiller is measured with the same."""
    return version("torch").partition("+")[0]


def default_environment() -> Path:
    """Return the default folder of the virtual environment."""
    return Path(f"~/.cache/scaledistill/bertdistiller-{VERSION}-torch-{our_torch()}").expanduser()


def ready_python(folder: Path) -> Path:
    """Return the interpreter of the virtual environment in `folder`, creating it if necessary.

    Raises:
        PeerError: it cannot be created, or has other versions.
    """
    python = folder / "bin" / "python"
    if _versions(python) is None:
        print(
            f"installing bertdistiller {VERSION} and torch {our_torch()} into {folder}; this takes "
            "minutes",
            file=sys.stderr,
        )
        wanted = [f"bertdistiller=={VERSION}", f"torch=={our_torch()}", "transformers<5"]
        _install([sys.executable, "-m", "venv", str(folder)])
        _install([str(python), "-m", "pip", "install", "--quiet", *wanted])
    found = _versions(python)
    if found is None or found[:2] != [VERSION, our_torch()] or int(found[2].partition(".")[0]) >= 5:
        raise PeerError(
            f"{folder} has bertdistiller, torch, transformers {found}; expected {VERSION}, "
            f"{our_torch()} and one below 5; remove it, or set another folder with --peer-venv"
        )
    return python


def _versions(python: Path) -> list[str] | None:
    """Return the versions of bertdistiller, torch and transformers, or None if one is missing.

    Build suffixes such as "+cu128" are removed.
    """
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run([python, "-c", QUERY], capture_output=True, text=True, check=True)
        return [word.partition("+")[0] for word in done.stdout.split()]
    return None


def _install(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise PeerError(
            f"no environment for bertdistiller: {' '.join(command)}: "
            f"{words[-1] if words else 'failed'}. Create one on a machine with a package index and "
            "set its folder with --peer-venv, or measure without bertdistiller: --no-peer"
        )


def train(spec: dict[str, Any], turns: Any) -> None:
    """Train according to `spec`, one optimizer step per turn, until the process is killed."""
    import numpy as np
    import torch
    from bertdistiller import MiniLMTrainer, MiniLMTrainingArguments
    from torch.utils.data import SequentialSampler
    from transformers import AutoModel, TrainerCallback

    on_gpu = torch.cuda.is_available()
    rows = [
        {"input_ids": row_T, "attention_mask": torch.ones_like(row_T)}
        for row_T in torch.from_numpy(np.load(spec["tokens"]))
    ]
    losses: list[torch.Tensor] = []

    class Trainer(MiniLMTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            # On GPUs bf16=True alone leaves the teacher and the loss in fp32.
            with torch.autocast(
                "cuda" if on_gpu else "cpu", torch.bfloat16, enabled=spec["arguments"]["bf16"]
            ):
                loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach())
            return loss

        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(rows)

    class OneStepPerTurn(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.await_turn()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - self.start
            peak = (
                torch.cuda.max_memory_allocated()
                if on_gpu
                else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
            )
            turns.answer(
                seconds=seconds,
                loss=torch.stack(losses).float().mean().item(),
                peak_memory_bytes=peak,
            )
            losses.clear()
            self.await_turn()

        def await_turn(self) -> None:
            turns.wait()
            self.start = time.perf_counter()

    teacher = AutoModel.from_pretrained(spec["teacher"])
    # bertdistiller accepts only this name; the encoder is the same.
    teacher.config.architectures = ["BertForMaskedLM"]
    arguments = MiniLMTrainingArguments(
        **spec["arguments"],
        relations={(a, b): weight for a, b, weight in spec["relations"]},
        max_steps=10**9,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not on_gpu,
    )
    student = AutoModel.from_pretrained(spec["student"])
    Trainer(
        model=student,
        teacher_model=teacher,
        args=arguments,
        train_dataset=rows,
        callbacks=[OneStepPerTurn()],
    ).train()


if __name__ == "__main__":
    # At the end of the path, so that this environment's packages take precedence.
    sys.path.append(str(Path(__file__).parents[2]))
    from scaledistill.metrics.benchmark import Turns

    train(json.loads(Path(sys.argv[1]).read_text()), Turns())
