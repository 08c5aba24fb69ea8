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
from scaledistill.data.mixture import Source, epochs
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
    """Return what a rank reads from storage, for all sources together.

    The rows of a lane are shuffled, so a rank touches nearly every block of its lanes.
    """
    order, batch = plan.order, plan.run.config.train.global_batch_size
    together = math.gcd(order.num_lanes, plan.run.world_size)
    lanes, sharers = order.num_lanes // together, plan.run.world_size // together
    reads_per_step = bytes_per_step = times_over = shards_per_epoch = 0.0
    for source, share in zip(plan.sources, order.shares, strict=True):
        manifest, shards = source.shards.manifest, len(source.shards.manifest.shards)
        at_once = source.shards.blocks_around(0, 0)  # the blocks that one read covers
        rows_per_read = min(
            sum(manifest.shards[0].block_rows[block] for block in at_once),
            source.order.window_rows,
        )
        # The probability that at least one row of a read is this rank's.
        touched = 1 - (1 - 1 / sharers) ** rows_per_read if sharers > 1 else 1.0
        rows_per_step = share * batch * touched / together
        reads_per_step += rows_per_step / rows_per_read
        bytes_per_step += rows_per_step * manifest.row_bytes
        times_over += share * sharers * touched
        shards_per_epoch += min(shards, shards / together + lanes)
    return Reads(lanes, sharers, reads_per_step, bytes_per_step, times_over, shards_per_epoch)


def _epochs(plan: Plan, num_steps: int) -> list[tuple[Source, float]]:
    """Return how often so many steps go through each source."""
    samples = num_steps * plan.run.config.train.global_batch_size
    by_name = epochs(plan.sources, plan.order, samples)
    return [(source, by_name[source.name]) for source in plan.sources]


def _epochs_text(plan: Plan, num_steps: int) -> str:
    """Say how often so many steps go through the data: "1.5 epochs", or by source."""
    found = _epochs(plan, num_steps)
    if len(found) == 1:
        return f"{found[0][1]:,.1f} epochs"
    return "epochs: " + ", ".join(f"{source.name} {number:,.1f}" for source, number in found)


def _of(plan: Plan, source: Source) -> str:
    """Begin a message with the source, if there are several."""
    return f"source {source.name}: " if len(plan.sources) > 1 else ""


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
    run, order = plan.run, plan.order
    shards = sum(len(source.shards.manifest.shards) for source in plan.sources)
    ranks, train, reading = run.world_size, run.config.train, reads(plan)
    length = run.config.data.sequence_length
    warnings = []
    if clipped := clipped_micro_batch(run):
        warnings.append(clipped)
    if reading.times_over > _MANY_READS:
        more = math.lcm(order.num_lanes, ranks)
        fewest = min(source.order.num_rows for source in plan.sources)
        warnings.append(
            f"data.num_lanes={order.num_lanes} with {counted(ranks, 'rank')}: {reading.sharers} "
            f"ranks share a lane, and storage serves each row {reading.times_over:.0f} times an "
            f"epoch; {_lanes_advice(more, fewest)} (before the first step: it is part of "
            "the order)"
        )
    if shards < ranks:
        warnings.append(
            f"{counted(shards, 'shard')} for {counted(ranks, 'rank')}: many read the same file at "
            "once, fine on a parallel file system, slow on one disk; make more shards with "
            "`scaledistill shards make --rows-per-shard`"
        )
    for source in plan.sources:
        if source.order.rows_per_lane <= source.order.window_rows:
            warnings.append(
                f"{_of(plan, source)}data.window_rows ({source.order.window_rows}) is at least the "
                f"rows per lane ({source.order.rows_per_lane}), so all lanes read at the same "
                "step; lower it or data.num_lanes"
            )
    if plan.estimate.on_host and train.precision == "bf16":
        warnings.append(BF16_ON_CPU)
    micro = run.micro_batch_size
    if ranks > 1 and micro * length < _FEW_TOKENS:
        warnings.append(
            f"a forward has {micro} × {length} = {micro * length} tokens: too few to fill a GPU; "
            "raise train.global_batch_size, or take fewer ranks"
        )
    for source, number in _epochs(plan, train.max_steps):
        if number > 100:
            remedy = "lower its weight, " if len(plan.sources) > 1 else ""
            warnings.append(
                f"{_of(plan, source)}each row is seen {number:,.0f} times; {remedy}make more "
                "shards or lower train.max_steps"
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
        **({"on resume": "\n".join(plan.notes)} if plan.notes else {}),
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
    heads = {name: config.relation_heads(name) for name in facts.students}
    by_student = ", ".join(f"{number} ({name})" for name, number in heads.items())
    number = str(*set(heads.values())) if len(set(heads.values())) == 1 else by_student
    return {
        "teacher": (
            f"{config.teacher.model}, up to layer {config.teacher.layer}: "
            f"{_millions(facts.teacher_parameters)}, {config.teacher.dtype}, placement "
            f"{config.teacher.placement}"
        ),
        "student" if len(facts.students) == 1 else "students": "\n".join(
            f"{name}: {_family(plan, name)}{_millions(size.parameters)}, {_trained(plan, name)}, "
            f"{config.train.precision}"
            for name, size in facts.students.items()
        ),
        "relations": f"{number} heads, pairs {', '.join(config.relations.pairs)}",
        "engine": f"{_engine_title(plan)}, {counted(ranks, 'rank')}",
    }


def _step_rows(plan: Plan) -> dict[str, str]:
    run, facts, train = plan.run, plan.estimate, plan.run.config.train
    micro_batches = counted(run.accumulation, "micro-batch", "micro-batches")
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
            f"{short(train.max_steps * run.tokens_per_step)} tokens, "
            f"{_epochs_text(plan, train.max_steps)}"
        ),
        "schedule": "\n".join(_schedules(run)),
    }


def _schedules(run: ResolvedRun) -> list[str]:
    """Return the run's schedule, and those of students that have another."""
    text = f"{schedule_text(run.config.train)}; peak {run.config.train.learning_rate:g}"
    lines = [text]
    for name in run.config.students:
        train = run.for_student(name).config.train
        own = f"{schedule_text(train)}; peak {train.learning_rate:g}"
        lines += [f"{name}: {own}"] if own != text else []
    return lines


def _data_rows(plan: Plan) -> dict[str, str]:
    ranks = plan.run.world_size
    found, sent = reads(plan), _sent(plan)
    parts = ", ".join(f"{what} {_size(size)}" for what, size in sent.items())
    rows_per_epoch = sum(source.order.rows_per_epoch for source in plan.sources)
    return {
        "data": "\n".join(
            _source_text(plan, source, share)
            for source, share in zip(plan.sources, plan.order.shares, strict=True)
        ),
        "  rank and epoch": (
            f"{rows_per_epoch / ranks:,.1f} rows from {found.lanes} of "
            f"{counted(plan.order.num_lanes, 'lane')}, about {found.shards_per_epoch:.1f} shards"
            + (" (one epoch of each source)" if len(plan.sources) > 1 else "")
        ),
        "  rank and step": f"{found.reads_per_step:.2g} reads, {_size(found.bytes_per_step)}",
        "network": (
            f"{_size(sum(sent.values()))} sent by each rank in a step"
            + (f" ({parts})" if ranks > 1 else "")
        ),
    }


def _source_text(plan: Plan, source: Source, share: float) -> str:
    manifest, order = source.shards.manifest, source.order
    # Epochs differ in the order of the shards: of a single one, the same rows are left over.
    always = " (the same in each; lower data.num_lanes)"
    text = (
        f"{counted(manifest.rows, 'row')} in {counted(len(manifest.shards), 'shard')}; "
        f"{counted(order.dropped_rows_per_epoch, 'row')} left out of an epoch"
        f"{always if order.dropped_rows_per_epoch and len(manifest.shards) == 1 else ''}"
    )
    return text if len(plan.sources) == 1 else f"{source.name}: {share:.2%} of the samples; {text}"


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
    validation = f", validation {config.data.validation}" if config.data.validation else ""
    training = f", training data {config.data.train}" if len(plan.sources) == 1 else ""
    lines = [
        *(
            f"student {name}: {_family(plan, name)}{_millions(size.parameters)} in its export, "
            f"{_trained(plan, name)}"
            for name, size in facts.students.items()
        ),
        f"teacher {config.teacher.model}, up to layer {config.teacher.layer}: "
        f"{_millions(facts.teacher_parameters)}, {config.teacher.dtype}, placement "
        f"{config.teacher.placement}",
        f"batch: {counted(ranks, 'rank')} × {run.micro_batch_size} × "
        f"{counted(run.accumulation, 'micro-batch', 'micro-batches')} = {train.global_batch_size} "
        f"sequences of {config.data.sequence_length}, {tokens:,} tokens a step",
        f"steps: {last_step:,}, {short(last_step * tokens)} tokens in all{_whole(plan, last_step)}",
        f"engine: {_engine_title(plan)}, {train.precision} on {device}, compile "
        f"{'on' if train.compile else 'off'}, relations by {config.relations.backend}",
        *_sources_lines(plan, step, last_step),
        f"paths: run {config.run.folder}{training}{validation}",
    ]
    if step:
        checkpoint = f"{config.run.folder}/checkpoints/step-{step:09d}"
        lines.append(
            f"resumed from {checkpoint}: {counted(last_step - step, 'step')} of {last_step:,} left"
        )
    if clipped := clipped_micro_batch(run):
        lines.append(f"note: {clipped}")
    return lines


def _whole(plan: Plan, last_step: int) -> str:
    """Return the epochs of a single source, to go on with in a line on steps."""
    (source, number), *others = _epochs(plan, last_step)
    rows = counted(source.order.rows_per_epoch, "row")
    return "" if others else f", {number:,.1f} epochs of {rows}"


def _sources_lines(plan: Plan, step: int, last_step: int) -> list[str]:
    """Return a line for each source, if there are several."""
    if len(plan.sources) == 1:
        return []
    done = dict(epochs(plan.sources, plan.order, step * plan.run.config.train.global_batch_size))
    return [
        f"source {source.name}: {share:.2%} of the samples, {number:,.1f} epochs of "
        f"{counted(source.order.rows_per_epoch, 'row')}"
        + (f" ({done[source.name]:,.1f} done)" if step else "")
        + f", {source.shards.location}"
        for (source, number), share in zip(_epochs(plan, last_step), plan.order.shares, strict=True)
    ]


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


def _family(plan: Plan, name: str) -> str:
    """Return a student's architecture, if its settings name one."""
    architecture = plan.run.config.students[name].architecture
    return f"{architecture}, " if architecture else ""


def _trained(plan: Plan, name: str) -> str:
    size = plan.estimate.students[name]
    if plan.run.config.students[name].tap == "extra":
        projection = size.trained - size.parameters
        if not projection:  # that of a block which all layers share
            return "all trained"
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
