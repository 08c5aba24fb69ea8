"""Measure the speed of models on this machine: latency and throughput for batches of 1 and 32.

Inputs: model folders. Outputs: a table, and `speed.json` and `speed.md` with the figures. The
encoders are measured without a head, on random token ids (their values do not matter) without
padding.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from scaledistill.errors import ConfigError, named
from scaledistill.glue.plan import Plan
from scaledistill.metrics.benchmark import Report, in_turn, machine_facts
from scaledistill.models.teacher import quiet_transformers, read_config

TOKENS = 128
BATCHES = (1, 32)
ROUNDS = 7
MAX_SECONDS = 60.0  # per model and batch size, but at least one round
ROUND_SECONDS = 0.3  # a round repeats small batches until it has taken this long


def check_positions(plan: Plan) -> None:
    """Check that all models of a plan can be measured.

    Raises:
        ConfigError: a model has too few positions.
    """
    for model in plan.models.values():
        if model.positions is not None and model.positions < TOKENS:
            raise ConfigError(
                f"the speed is measured on {TOKENS} tokens, more than the {model.positions} "
                f"positions of model {model.name}; leave the model or --speed out"
            )


def measure_speed(folders: Mapping[str, Path], output: Path) -> Report:
    """Measure the models in interleaved rounds and return the report.

    `speed.json` and `speed.md` are written into `output`.

    Args:
        folders: each model's folder by its name; the others are compared with the first.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = (
        torch.bfloat16
        if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        else torch.float32
    )
    models = {name: _encoder(folder, device, dtype) for name, folder in folders.items()}
    report = Report()
    precision = str(dtype).removeprefix("torch.")
    where = (
        torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    )
    heads = [
        f"{what}, batch {batch}" for batch in BATCHES for what in ("ms", "sequences/s", "faster")
    ]
    table = report.table(
        f"Speed of the encoders, {TOKENS} tokens, {precision}, {where}: medians",
        ["model", "parameters", *heads],
    )
    sizes = {
        name: sum(weight.numel() for weight in model.parameters()) for name, model in models.items()
    }
    lines = {name: [name, f"{size / 1e6:.1f} M"] for name, size in sizes.items()}
    for name, size in sizes.items():
        report.add(f"{name}/parameters", size, "parameters")
    for batch in BATCHES:
        runs = {name: _run(model, batch, device) for name, model in models.items()}
        for run in runs.values():  # warm-up
            run()
        seconds = in_turn(runs, rounds=ROUNDS, max_seconds=MAX_SECONDS, title=f"batch {batch}")
        for name, own in report.add_speeds(seconds, batch).items():
            lines[name] += own
    table.rows.extend(lines.values())
    output.mkdir(parents=True, exist_ok=True)
    facts = machine_facts(where if on_gpu else None)
    (output / "speed.json").write_text(report.json())
    (output / "speed.md").write_text(
        "\n\n".join(
            [table.markdown(), "\n".join(f"- {name}: {fact}" for name, fact in facts.items())]
        )
        + "\n"
    )
    return report


def _encoder(folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    with named(model=str(folder)):
        config = read_config(folder)
    with quiet_transformers():
        model = AutoModel.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    nn.Module.to(model, device)
    return model.eval()


def _run(model: PreTrainedModel, batch: int, device: torch.device) -> Callable[[], float]:
    """Return a function that runs the model on a batch and returns the seconds of one forward.

    A quick forward is repeated, and the median returned.
    """
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, model.config.vocab_size, (batch, TOKENS), generator=generator).to(
        device
    )
    mask_BT = torch.ones_like(ids_BT)

    @torch.inference_mode()
    def run() -> float:
        seconds: list[float] = []
        while not seconds or sum(seconds) < ROUND_SECONDS:
            start = time.perf_counter()
            model(input_ids=ids_BT, attention_mask=mask_BT)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    return run
