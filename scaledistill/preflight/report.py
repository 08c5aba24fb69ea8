"""A report of what a run needs of memory, network and storage, on any number of ranks.

Inputs: a `preflight.checks.Plan`. Outputs: tables and warnings. Not handled here: the checks
(`preflight.checks`), the sizes of models and activations (`preflight.estimate`).

Legend: L lanes, W ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.table import Table

from scaledistill.config.resolved import ResolvedRun
from scaledistill.config.schedule import schedule_text
from scaledistill.distributed.ranks import BF16_ON_CPU
from scaledistill.engines import engine_traits
from scaledistill.errors import counted
from scaledistill.metrics.display import short
from scaledistill.preflight.checks import Plan
from scaledistill.preflight.estimate import Estimate
from scaledistill.preflight.resolve import clipped_micro_batch

# A forward with fewer tokens does not fill a large GPU's matrix units.
_FEW_TOKENS = 2048
# Warn if all ranks together read each row more often than this per epoch.
_MANY_READS = 1.5


@dataclass(frozen=True)
class Reads:
    """What one rank reads from storage, on average."""

    lanes: int
    """Lanes that its samples come from: L / gcd(L, W), since sample n is in lane n mod L, and rank
    n mod W reads it."""
    sharers: int
    """Ranks that read the same lanes."""
    reads_per_step: float
    bytes_per_step: float
    times_over: float
    """How often all ranks together read each row per epoch: 1 at best."""
    shards_per_epoch: float


def reads(plan: Plan) -> Reads:
    """Return what a rank reads from storage.

    The rows of a lane are shuffled, so a rank touches nearly every block of its lanes.
    """
    manifest, order, train = plan.shards.manifest, plan.order, plan.run.config.train
    together = math.gcd(order.num_lanes, plan.run.world_size)
    lanes, sharers = order.num_lanes // together, plan.run.world_size // together
    at_once = plan.shards.blocks_around(0, 0)  # the blocks that one read covers
    rows_per_read = min(
        sum(manifest.shards[0].block_rows[block] for block in at_once), order.window_rows
    )
    # The probability that at least one row of a read is this rank's.
    touched = 1 - (1 - 1 / sharers) ** rows_per_read if sharers > 1 else 1.0
    rows_per_step = train.global_batch_size * touched / together
    return Reads(
        lanes=lanes,
        sharers=sharers,
        reads_per_step=rows_per_step / rows_per_read,
        bytes_per_step=rows_per_step * manifest.row_bytes,
        times_over=sharers * touched,
        shards_per_epoch=min(len(manifest.shards), len(manifest.shards) / together + lanes),
    )


def traffic(run: ResolvedRun, facts: Estimate, placement: str) -> dict[str, float]:
    """Return the bytes that each rank sends and receives per step, by use.

    That is what the engine sends for the student, and for a sharded teacher one all-gather in each
    micro-batch.
    """
    sent: dict[str, float] = {}
    for name, size in facts.students.items():
        for what, num_bytes in engine_traits(run.for_student(name)).traffic(size.trained).items():
            sent[what] = sent.get(what, 0.0) + num_bytes
    if placement != "replicate":
        ring = (run.world_size - 1) / run.world_size
        gathered = facts.teacher_parameters * run.teacher_dtype.itemsize
        sent["teacher"] = run.accumulation * ring * gathered
    return sent


def warnings_of(plan: Plan) -> list[str]:
    """Return warnings about what will work but could be faster, with the setting to change."""
    run, order, shards = plan.run, plan.order, len(plan.shards.manifest.shards)
    ranks, train, reading = run.world_size, run.config.train, reads(plan)
    length = run.config.data.sequence_length
    warnings = []
    if clipped := clipped_micro_batch(run):
        warnings.append(clipped)
    if reading.times_over > _MANY_READS:
        more = math.lcm(order.num_lanes, ranks)
        warnings.append(
            f"data.num_lanes={order.num_lanes} with {counted(ranks, 'rank')}: {reading.sharers} "
            f"ranks share a lane, and storage serves each row {reading.times_over:.0f} times an "
            f"epoch; {_lanes_advice(more, order.num_rows)} (before the first step: it is part of "
            "the order)"
        )
    if shards < ranks:
        warnings.append(
            f"{counted(shards, 'shard')} for {counted(ranks, 'rank')}: many read the same file at "
            "once, fine on a parallel file system, slow on one disk; make more shards with "
            "tools/make_shards.py --rows-per-shard"
        )
    if order.rows_per_lane <= order.window_rows:
        warnings.append(
            f"data.window_rows ({order.window_rows}) is at least the rows per lane "
            f"({order.rows_per_lane}), so all lanes read at the same step; lower it or "
            "data.num_lanes"
        )
    if plan.estimate.on_host and train.precision == "bf16":
        warnings.append(BF16_ON_CPU)
    micro = run.micro_batch_size
    if ranks > 1 and micro * length < _FEW_TOKENS:
        warnings.append(
            f"a forward has {micro} × {length} = {micro * length} tokens: too few to fill a GPU; "
            "raise train.global_batch_size, or take fewer ranks"
        )
    epochs = train.max_steps * train.global_batch_size / order.rows_per_epoch
    if epochs > 100:
        warnings.append(
            f"each row is seen {epochs:,.0f} times; make more shards or lower train.max_steps"
        )
    return warnings


def _lanes_advice(lanes: int, num_rows: int) -> str:
    if lanes <= num_rows:
        return f"data.num_lanes={lanes} reads each once"
    return f"to read each once, {lanes} lanes and as many rows would be needed"


def plan_table(plan: Plan, tokens_per_second: float | None = None) -> Table:
    """Return the plan as a table; with `tokens_per_second` of one rank, it shows the duration."""
    rows = {
        **_model_rows(plan),
        **_step_rows(plan),
        **(_duration(plan, tokens_per_second) if tokens_per_second else {}),
        **_data_rows(plan),
        **_memory_rows(plan),
        "run folder": plan.run.config.run.folder,
        **_evaluation(plan),
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in rows.items():
        table.add_row(label, text)
    return table


def _model_rows(plan: Plan) -> dict[str, str]:
    config, facts, ranks = plan.run.config, plan.estimate, plan.run.world_size
    heads = {name: config.relation_heads(name) for name in config.students}
    by_student = ", ".join(f"{number} ({name})" for name, number in heads.items())
    number = str(*set(heads.values())) if len(set(heads.values())) == 1 else by_student
    return {
        "teacher": (
            f"{config.teacher.model}, up to layer {config.teacher.layer}: "
            f"{_millions(facts.teacher_parameters)}, {config.teacher.dtype}, placement "
            f"{config.teacher.placement}"
        ),
        "student" if len(facts.students) == 1 else "students": "\n".join(
            f"{name}: {_millions(size.parameters)}, {_trained(plan, name)}, "
            f"{config.train.precision}"
            for name, size in facts.students.items()
        ),
        "relations": f"{number} heads, pairs {', '.join(config.relations.pairs)}",
        "engine": f"{_engine_title(plan)}, {counted(ranks, 'rank')}",
    }


def _step_rows(plan: Plan) -> dict[str, str]:
    run, facts, train = plan.run, plan.estimate, plan.run.config.train
    micro_batches = counted(run.accumulation, "micro-batch", "micro-batches")
    epochs = train.max_steps * train.global_batch_size / plan.order.rows_per_epoch
    return {
        "step": (
            f"{train.global_batch_size} sequences × {run.config.data.sequence_length} = "
            f"{run.tokens_per_step:,} tokens; {micro_batches} of {run.micro_batch_size} per rank"
        ),
        "FLOPs": (
            f"{short(facts.flops_per_token)} per token, {facts.teacher_flops_fraction:.0%} the "
            "teacher's"
        ),
        "run": (
            f"{counted(train.max_steps, 'step')}, "
            f"{short(train.max_steps * run.tokens_per_step)} tokens, {epochs:,.1f} epochs"
        ),
        "schedule": f"{schedule_text(train)}; peak {train.learning_rate:g}",
    }


def _data_rows(plan: Plan) -> dict[str, str]:
    order, manifest, ranks = plan.order, plan.shards.manifest, plan.run.world_size
    found, sent = reads(plan), _sent(plan)
    parts = ", ".join(f"{what} {_size(size)}" for what, size in sent.items())
    return {
        "data": (
            f"{counted(manifest.rows, 'row')} in {counted(len(manifest.shards), 'shard')}; "
            f"{counted(order.dropped_rows_per_epoch, 'row')} left out of an epoch"
        ),
        "  rank and epoch": (
            f"{order.rows_per_epoch / ranks:,.1f} rows from {found.lanes} of "
            f"{counted(order.num_lanes, 'lane')}, about {found.shards_per_epoch:.1f} shards"
        ),
        "  rank and step": f"{found.reads_per_step:.2g} reads, {_size(found.bytes_per_step)}",
        "network": (
            f"{_size(sum(sent.values()))} sent by each rank in a step"
            + (f" ({parts})" if ranks > 1 else "")
        ),
    }


def _memory_rows(plan: Plan) -> dict[str, str]:
    facts, needed = plan.estimate, plan.estimate.memory_bytes(plan.run.micro_batch_size)
    where = " in host memory" if facts.optimizer_on_host else ""
    return {
        "memory per rank": _size(needed),
        "  teacher": _size(facts.teacher_bytes),
        "  weights, gradients": _size(facts.weights_and_gradients_bytes),
        "  optimizer": _size(facts.optimizer_bytes) + where,
        "  activations": (
            f"{_size(needed - facts.state_bytes)}, of which the relation loss "
            f"{_size(facts.relation_bytes)}"
        ),
        "checkpoint": (
            f"{_size(facts.checkpoint_bytes)}, {plan.run.config.checkpoint.keep} kept; "
            f"{_size(plan.free_disk_bytes)} free"
        ),
    }


def _sent(plan: Plan) -> dict[str, float]:
    return traffic(plan.run, plan.estimate, plan.run.config.teacher.placement)


def start_summary(plan: Plan, device: str, *, step: int, last_step: int) -> list[str]:
    """Return the log lines that say what a run is about to do.

    Args:
        device: "cuda" or "cpu".
        step: the step that the run resumes from, or 0.
        last_step: the last step of the run.
    """
    run, facts, config = plan.run, plan.estimate, plan.run.config
    train, ranks, tokens = config.train, run.world_size, run.tokens_per_step
    epochs = last_step * train.global_batch_size / plan.order.rows_per_epoch
    validation = f", validation {config.data.validation}" if config.data.validation else ""
    lines = [
        *(
            f"student {name}: {_millions(size.parameters)} in its export, {_trained(plan, name)}"
            for name, size in facts.students.items()
        ),
        f"teacher {config.teacher.model}, up to layer {config.teacher.layer}: "
        f"{_millions(facts.teacher_parameters)}, {config.teacher.dtype}, placement "
        f"{config.teacher.placement}",
        f"batch: {counted(ranks, 'rank')} × {run.micro_batch_size} × "
        f"{counted(run.accumulation, 'micro-batch', 'micro-batches')} = {train.global_batch_size} "
        f"sequences of {config.data.sequence_length}, {tokens:,} tokens a step",
        f"steps: {last_step:,}, {short(last_step * tokens)} tokens in all, {epochs:,.1f} epochs of "
        f"{counted(plan.order.rows_per_epoch, 'row')}",
        f"engine: {_engine_title(plan)}, {train.precision} on {device}, compile "
        f"{'on' if train.compile else 'off'}, relations by {config.relations.backend}",
        f"paths: run {config.run.folder}, training data {config.data.train}{validation}",
    ]
    if step:
        checkpoint = f"{config.run.folder}/checkpoints/step-{step:09d}"
        lines.append(
            f"resumed from {checkpoint}: {counted(last_step - step, 'step')} of {last_step:,} left"
        )
    if clipped := clipped_micro_batch(run):
        lines.append(f"note: {clipped}")
    return lines


def placement_table(plan: Plan, memory_bytes: int | None = None) -> Table:
    """Return what a rank needs for each `teacher.placement`, and if it fits in `memory_bytes`."""
    run, facts = plan.run, plan.estimate
    beside = facts.memory_bytes(run.micro_batch_size) - facts.teacher_bytes
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("teacher.placement", "teacher", "host", "rank total", "network/step"):
        table.add_column(heading, justify="left" if heading == "teacher.placement" else "right")
    if memory_bytes:
        table.add_column(f"in {_size(memory_bytes)}")
    for placement, (device_bytes, host_bytes) in facts.placements.items():
        cells = [
            device_bytes,
            host_bytes,
            beside + device_bytes,
            sum(traffic(run, facts, placement).values()),
        ]
        fits = [] if not memory_bytes else ["fits" if cells[2] <= memory_bytes else "too large"]
        table.add_row(placement, *map(_size, cells), *fits)
    return table


def _evaluation(plan: Plan) -> dict[str, str]:
    if plan.evaluation is None:
        return {}
    # Imported here because it takes seconds.
    from scaledistill.glue.listing import duration, estimated_seconds

    time = duration(estimated_seconds(plan.evaluation_flops))
    return {
        "evaluation": f"{plan.evaluation}, about {time} on this machine (estimated from the FLOPs)"
    }


def _duration(plan: Plan, tokens_per_second: float) -> dict[str, str]:
    run, steps = plan.run, plan.run.config.train.max_steps
    speed = tokens_per_second * run.world_size
    seconds = run.tokens_per_step / speed
    text = f"{3600 / seconds:,.0f} steps and {short(3600 * speed)} tokens an hour, "
    text += f"{steps * seconds / 3600:,.1f} hours, at {short(tokens_per_second)} tokens/s per rank"
    if run.world_size > 1:
        sent = sum(_sent(plan).values())
        text += f"; the network must carry {_size(sent / seconds)}/s per rank"
    return {"  time": text}


def _engine_title(plan: Plan) -> str:
    name = next(iter(plan.run.config.students))
    return engine_traits(plan.run.for_student(name)).title


def _trained(plan: Plan, name: str) -> str:
    size = plan.estimate.students[name]
    if plan.run.config.students[name].tap == "extra":
        projection = size.trained - size.parameters
        return f"all trained, and a projection of {_millions(projection)} that the export drops"
    return f"of which {_millions(size.trained)} are trained"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M parameters" if count >= 1e5 else f"{count:,} parameters"


def _size(num_bytes: float) -> str:
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.2f} GB"
    return (
        f"{num_bytes / 1e6:.1f} MB"
        if num_bytes >= 1e6 or not num_bytes
        else f"{num_bytes / 1e3:.1f} kB"
    )
