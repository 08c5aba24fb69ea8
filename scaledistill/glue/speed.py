"""How fast models are on this machine: latency of a batch of 1 and of 32, sequences per second, and
the sizes.

Enters: model folders. Leaves: a table, and `speed.json` with the figures. Measured are encoders as
they are fine-tuned, without a head, on sequences without padding; random token ids, since their
values cost nothing.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from scaledistill.errors import ConfigError
from scaledistill.glue.plan import Plan
from scaledistill.metrics.benchmark import Report, in_turn, machine_facts, ratios
from scaledistill.models.teacher import quiet_transformers, read_config

TOKENS = 128
BATCHES = (1, 32)
ROUNDS = 7
MAX_SECONDS = 60.0  # a model and batch size; one round at least
ROUND_SECONDS = 0.3  # small batches are repeated within a round


def check_positions(plan: Plan) -> None:
    """Raise ConfigError unless all models of a plan can be measured."""
    for model in plan.models.values():
        if model.positions is not None and model.positions < TOKENS:
            raise ConfigError(
                f"the speed is measured on {TOKENS} tokens, more than the {model.positions} "
                f"positions of model {model.name}; leave the model or --speed out"
            )


def measure_speed(folders: Mapping[str, Path], output: Path) -> Report:
    """Measure the models side by side, in interleaved rounds; write `speed.json` into `output` and
    return the report.

    Args:
        folders: by the model's name; the others are compared with the first.
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
    first = next(iter(models))
    for batch in BATCHES:
        runs = {name: _run(model, batch, device) for name, model in models.items()}
        for run in runs.values():  # warm
            run()
        seconds = in_turn(runs, rounds=ROUNDS, max_seconds=MAX_SECONDS, title=f"batch {batch}")
        for name, taken in seconds.items():
            latency = report.add(
                f"{name}/latency/batch-{batch}", [1000 * one for one in taken], "ms"
            )
            rate = report.add(
                f"{name}/throughput/batch-{batch}", [batch / one for one in taken], "sequences/s"
            )
            faster = report.add(f"{name}/speedup/batch-{batch}", ratios(seconds[first], taken), "×")
            lines[name] += [
                f"{latency:.1f}",
                f"{rate:.1f}",
                "1" if name == first else f"{faster:.2f}×",
            ]
    table.rows.extend(lines.values())
    output.mkdir(parents=True, exist_ok=True)
    facts = machine_facts(where if on_gpu else None)
    (output / "speed.json").write_text(json.dumps(report.figures, indent=1) + "\n")
    (output / "speed.md").write_text(
        "\n\n".join(
            [table.markdown(), "\n".join(f"- {name}: {fact}" for name, fact in facts.items())]
        )
        + "\n"
    )
    return report


def _encoder(folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    config = read_config(folder, str(folder))
    with quiet_transformers():
        model = AutoModel.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    nn.Module.to(model, device)
    return model.eval()


def _run(model: PreTrainedModel, batch: int, device: torch.device) -> Callable[[], float]:
    """Return what runs the model on a batch, several times if that is quick, and returns the
    seconds of one.
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
