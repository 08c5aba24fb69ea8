"""What a run needs and how long it takes on types of GPUs that need not be here.

Inputs: a configuration and the model configs. Outputs: `Needs` per number of GPUs and a `Forecast`
per type and number, from counted FLOPs, data sheets and an efficiency. No weights and no shards are
read. Not handled here: the estimate of memory itself (`preflight.estimate`).

Legend: W ranks.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from scaledistill.config.naming import teacher_names
from scaledistill.config.resolved import ResolvedRun
from scaledistill.config.schema import DistillConfig
from scaledistill.errors import ConfigError, SettingError, named
from scaledistill.metrics.recorder import read_rows
from scaledistill.metrics.stopwatch import PEAK_FLOPS, measured_matrix_rate, peak_flops
from scaledistill.models.architectures import check_layer
from scaledistill.models.teacher import load_config
from scaledistill.preflight.checks import student_shape
from scaledistill.preflight.estimate import Estimate, estimate
from scaledistill.preflight.microbatch import candidates, free_bytes, largest
from scaledistill.preflight.report import traffic
from scaledistill.preflight.resolve import resolve, resolve_for_gpus

MACHINE_GPUS = 8
"""GPUs of a machine; more ranks than these are on several."""
NETWORK_BYTES_PER_SECOND = 25e9
"""Between machines, per GPU: 200 Gb/s."""


class Device(NamedTuple):
    """A device to plan for."""

    name: str
    memory_bytes: int
    peak_flops: float
    """Dense FLOP/s: 16-bit of a data sheet, or as measured for this machine's CPU."""
    link_bytes_per_second: float
    """To the others of its machine, in each direction."""


def _gpu(name: str, memory_gb: int, link_gb: int, part: str | None = None) -> Device:
    return Device(name, memory_gb * 10**9, PEAK_FLOPS[part or name], link_gb * 1e9)


# Memory and links from the vendors' data sheets: PCIe 4.0 x16, or NVLink where there is a switch.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("RTX 4090", 24, 32),
        _gpu("A6000", 48, 32),
        _gpu("L40S", 48, 32),
        _gpu("A100 40GB", 40, 300, "A100"),
        _gpu("A100 80GB", 80, 300, "A100"),
        _gpu("H100", 80, 450),
        _gpu("H200", 141, 450),
        _gpu("B200", 180, 900),
    )
}


@dataclass(frozen=True)
class Efficiency:
    """The model FLOP/s that a run reaches, as a part of the device's peak, with its range."""

    low: float
    middle: float
    high: float
    source: str
    """Where it comes from, for people."""

    @classmethod
    def stated(cls, value: float) -> Efficiency:
        """Return a stated efficiency, ± 15 %: it changes with shapes, versions and clocks."""
        return cls(0.85 * value, value, min(1.0, 1.15 * value), "stated, ± 15 %")

    @classmethod
    def of_run(cls, folder: Path) -> Efficiency:
        """Return what a run has measured (`mfu` in metrics.jsonl), without its first tenth.

        Raises:
            SettingError: it has fewer than three such rows.
        """
        rows = [row["mfu"] for row in read_rows(folder / "metrics.jsonl") if row.get("mfu")]
        rows = rows[len(rows) // 10 :]
        if len(rows) < 3:
            raise SettingError(
                "folder",
                str(folder),
                f"has {len(rows)} rows with mfu in metrics.jsonl, expected three or more",
                "give the folder of a run that has logged more, or state the efficiency",
            )
        middle = statistics.median(rows)
        spread = max(0.1 * middle, 2 * statistics.stdev(rows))
        low, high = max(0.1 * middle, middle - spread), min(1.0, middle + spread)
        return cls(low, middle, high, f"measured in {folder}: median of {len(rows)} rows")


ASSUMED = Efficiency(0.25, 0.4, 0.55, "assumed: 25 to 55 %")
"""On GPUs, for encoders of 128 to 512 tokens in 16 bits; no measurement of ours yet."""
ASSUMED_ON_CPU = Efficiency(0.6, 0.75, 0.9, "of the measured matrix rate: 60 to 90 %")
"""As docs/benchmarks.md has measured it."""


class Needs(NamedTuple):
    """What each rank needs if there are so many."""

    run: ResolvedRun
    """With the smallest micro-batch."""
    facts: Estimate


class Forecast(NamedTuple):
    """A run on a number of devices of one type."""

    device: Device
    num_ranks: int
    largest_micro_batch: int | None
    """Sequences; None if not even the smallest fits."""
    run: ResolvedRun
    """With the micro-batch of the configuration, or the largest that fits."""
    memory_bytes: int
    """Per rank, with this micro-batch."""
    step_seconds: tuple[float, float, float]
    """At best, expected, at worst."""

    @property
    def fits(self) -> bool:
        """Whether the micro-batch of `run` fits in memory."""
        return (self.largest_micro_batch or 0) >= self.run.micro_batch_size

    @property
    def tokens_per_second(self) -> float:
        """As expected, of all ranks together."""
        return self.run.tokens_per_step / self.step_seconds[1]

    @property
    def seconds(self) -> tuple[float, float, float]:
        """Time to the last step: at best, expected, at worst; without validation and saving."""
        best, middle, worst = (self.run.config.train.max_steps * x for x in self.step_seconds)
        return best, middle, worst


def models_of(
    config: DistillConfig,
) -> tuple[PretrainedConfig, dict[str, PretrainedConfig]]:
    """Return the model configs of the teacher and, by name, of the students.

    Raises:
        ConfigError, DataError: see `load_config` and `student_shape`.
    """
    with named(**teacher_names(config.teacher)):
        teacher = load_config(
            config.teacher.model, config.teacher.revision, config.teacher.trust_remote_code
        )
        check_layer(config.teacher.layer, teacher.num_hidden_layers)
    return teacher, {name: student_shape(config, name, teacher) for name in config.students}


def needs_on_gpus(
    config: DistillConfig,
    teacher: PretrainedConfig,
    students: Mapping[str, PretrainedConfig],
    num_gpus: int,
) -> Needs:
    """Return what a run needs on so many GPUs.

    Raises:
        ConfigError: the global batch is not divisible by them, or the engine's settings are wrong.
    """
    # The compiler of those machines is not this one's.
    own = {"compile": False, "micro_batch_size": "auto"}
    config = config.model_copy(update={"train": config.train.model_copy(update=own)})
    return _needs(resolve_for_gpus(config, num_gpus, torch.device("cpu")), teacher, students)


def needs_here(
    config: DistillConfig,
    teacher: PretrainedConfig,
    students: Mapping[str, PretrainedConfig],
    device: torch.device,
) -> Needs:
    """Return what a run of one rank needs on this machine's device.

    On a CPU, precisions of 16 bits are those that "auto" would take: fp16 is refused there, and
    bf16 without the units for it is emulated, a hundred times slower. So is the backend "triton".

    Raises:
        ConfigError: see `resolve`.
    """
    train: dict[str, object] = {"micro_batch_size": "auto"}
    update: dict[str, object] = {}
    if device.type == "cpu":
        if config.train.precision != "fp32":
            train["precision"] = "auto"
        if config.train.precision != "fp32" or config.teacher.dtype != "fp32":
            update["teacher"] = config.teacher.model_copy(update={"dtype": "auto"})
        if config.relations.backend == "triton":
            update["relations"] = config.relations.model_copy(update={"backend": "auto"})
    update["train"] = config.train.model_copy(update=train)
    return _needs(resolve(config.model_copy(update=update), 1, device), teacher, students)


def _needs(
    run: ResolvedRun, teacher: PretrainedConfig, students: Mapping[str, PretrainedConfig]
) -> Needs:
    run = run.with_micro_batch(1)
    return Needs(run, estimate(run, teacher, students))


def this_device(device: torch.device, run: ResolvedRun) -> Device:
    """Return this machine's device with its free memory; a CPU's rate is measured, in 0.2 s."""
    if device.type == "cuda":
        peak = peak_flops(device) or measured_matrix_rate(device, run.teacher_dtype)
        name = f"here: {torch.cuda.get_device_name(device)}"
        return Device(name, free_bytes(device, 1), peak, float("inf"))
    rate = measured_matrix_rate(device, run.teacher_dtype)
    return Device("here: CPU", free_bytes(device, 1), rate, float("inf"))


def forecast(
    needs: Needs, device: Device, efficiency: Efficiency, micro_batch: int | str | None = "auto"
) -> Forecast:
    """Return how a run does on devices of one type, as many as `needs` is for.

    Args:
        micro_batch: that of the configuration; "auto" is the largest that fits, None the share of
            a rank.
    """
    run, facts = needs
    try:
        most: int | None = largest(run, facts, device.memory_bytes)
    except ConfigError:
        most = None
    sizes = candidates(run)
    size = most or 1
    if micro_batch != "auto":
        size = max(one for one in sizes if not isinstance(micro_batch, int) or one <= micro_batch)
    run = run.with_micro_batch(size)
    return Forecast(
        device,
        run.world_size,
        most,
        run,
        facts.memory_bytes(size),
        _step_seconds(run, facts, device, efficiency),
    )


def _step_seconds(
    run: ResolvedRun, facts: Estimate, device: Device, efficiency: Efficiency
) -> tuple[float, float, float]:
    """Return the seconds of a step at best, as expected and at worst.

    What is sent overlaps with computation completely, by half, or not at all.
    """
    flops = run.tokens_per_step * facts.flops_per_token / run.world_size
    link = device.link_bytes_per_second
    if run.world_size > MACHINE_GPUS:
        link = min(link, NETWORK_BYTES_PER_SECOND)
    sending = sum(traffic(run, facts, run.config.teacher.placement).values()) / link
    best, middle, worst = (
        flops / (device.peak_flops * part)
        for part in (efficiency.high, efficiency.middle, efficiency.low)
    )
    return best, middle + sending / 2, worst + sending


def parts(facts: Estimate) -> dict[str, int]:
    """Return a rank's bytes by part, and those of each sequence of the micro-batch."""
    found = {
        "teacher": facts.teacher_bytes,
        "weights and gradients": facts.weights_and_gradients_bytes,
        "optimizer": facts.optimizer_bytes,
        "buffers": facts.engine_bytes,
        "activations per sequence": facts.activation_bytes_per_sequence,
    }
    if facts.on_host:
        found["data and heap"] = facts.data_bytes + facts.heap_bytes
    return found


class Survey(NamedTuple):
    """A run on several numbers of several types of devices, and on this machine."""

    needs: list[Needs]
    forecasts: list[Forecast]
    problems: list[str]
    """Why the run cannot have some of the numbers of ranks."""


def survey(
    config: DistillConfig,
    gpus: Sequence[Device],
    counts: Iterable[int],
    efficiency: Efficiency = ASSUMED,
) -> Survey:
    """Return what a run needs and how long it takes on each of `counts` of each of `gpus`.

    One rank on this machine's GPU or CPU comes first.

    Raises:
        ConfigError, DataError: the models cannot be read, or settings are wrong.
    """
    teacher, students = models_of(config)
    micro_batch = config.train.micro_batch_size
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    alone = needs_here(config, teacher, students, device)
    needs, problems = [], []
    for count in counts:
        try:
            needs.append(needs_on_gpus(config, teacher, students, count))
        except ConfigError as error:
            problems.append(str(error))
    rate = efficiency if device.type == "cuda" else ASSUMED_ON_CPU
    forecasts = [forecast(alone, this_device(device, alone.run), rate, micro_batch)]
    forecasts += [forecast(need, gpu, efficiency, micro_batch) for gpu in gpus for need in needs]
    return Survey([alone, *needs], forecasts, problems)


def chosen(names: Sequence[str] | None) -> list[Device]:
    """Return the known GPUs whose name has one of `names` in it; all without names.

    Raises:
        SettingError: no GPU is called so.
    """
    if not names:
        return list(GPUS.values())
    found: dict[str, Device] = {}
    for name in names:
        matching = {key: gpu for key, gpu in GPUS.items() if name.lower() in key.lower()}
        if not matching:
            raise SettingError("names", name, "is not known", f"use {', '.join(GPUS)}")
        found |= matching
    return list(found.values())


def figures(found: Survey) -> list[dict[str, object]]:
    """Return every figure of a survey as name, value, unit and n.

    A largest micro-batch of 0 means that not even the smallest fits.
    """
    rows: list[dict[str, object]] = []

    def add(name: str, value: float, unit: str) -> None:
        rows.append({"name": f"estimate/{name}", "value": value, "unit": unit, "n": 1})

    for run, facts in found.needs:
        where = f"{run.device_type}/{run.world_size}"
        for part, num_bytes in parts(facts).items():
            add(f"{where}/{part.replace(' ', '_')}_bytes", num_bytes, "bytes")
        add(f"{where}/flops_per_token", facts.flops_per_token, "FLOP")
    for number, one in enumerate(found.forecasts):
        kind = "here" if number == 0 else one.device.name.replace(" ", "-").lower()
        where = f"{kind}/{one.num_ranks}"
        add(f"{where}/largest_micro_batch", one.largest_micro_batch or 0, "sequences")
        add(f"{where}/micro_batch", one.run.micro_batch_size, "sequences")
        add(f"{where}/memory_bytes", one.memory_bytes, "bytes")
        add(f"{where}/tokens_per_second", one.tokens_per_second, "tokens/s")
        for name, seconds in zip(("least", "expected", "most"), one.seconds, strict=True):
            add(f"{where}/{name}_hours", seconds / 3600, "hours")
    return rows
