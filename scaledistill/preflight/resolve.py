"""Decide what "auto" means in a run: precisions, relation backend, micro-batch, compilation.

Inputs: a configuration, the number of ranks and their device. Outputs: a `ResolvedRun`. Not handled
here: checking models and data (`preflight.checks`), the largest micro-batch that fits
(`preflight.microbatch`).
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import torch

from scaledistill.config.resolved import ResolvedRun
from scaledistill.config.schema import DistillConfig
from scaledistill.distributed.ranks import resolve_precision, resolve_teacher_dtype
from scaledistill.engines import engine_traits
from scaledistill.errors import ConfigError, counted, named
from scaledistill.relations import resolve_backend


def resolve(config: DistillConfig, world_size: int, device: torch.device) -> ResolvedRun:
    """Return a run with precisions, backend, micro-batch and compile resolved.

    A micro-batch of "auto" becomes the rank's whole share of the global batch.

    Raises:
        ConfigError: the global batch is not divisible, the engine's block is wrong, or the device
            or engine lacks a precision.
    """
    train, teacher = config.train, config.teacher
    with named(backend="relations.backend", precision="train.precision", dtype="teacher.dtype"):
        backend = resolve_backend(config.relations.backend, device.type)
        precision = resolve_precision(train.precision, device)
        teacher_dtype = resolve_teacher_dtype(teacher.dtype, train.precision, device)
    batch, share = train.global_batch_size, max(1, train.global_batch_size // world_size)
    stated = train.micro_batch_size if isinstance(train.micro_batch_size, int) else None
    micro = min(stated or share, share)
    if batch % (world_size * micro):
        raise ConfigError(_indivisible(batch, world_size, share, micro if stated else None))
    compiles = _compiles(config, backend, device)
    settled = config.model_copy(
        update={
            "train": train.model_copy(
                update={"precision": precision, "micro_batch_size": micro, "compile": compiles}
            ),
            "teacher": teacher.model_copy(update={"dtype": teacher_dtype}),
            "relations": config.relations.model_copy(update={"backend": backend}),
        }
    )
    run = ResolvedRun(settled, config, world_size, device.type)
    for name in config.students:
        engine_traits(run.for_student(name))  # checks the engine's settings
    return run


def resolve_for_gpus(config: DistillConfig, world_size: int, device: torch.device) -> ResolvedRun:
    """Return a run as it would be resolved on GPUs with bf16, on a machine with or without any.

    Raises:
        ConfigError: see `resolve`.
    """
    if device.type == "cuda":
        return resolve(config, world_size, device)
    train, teacher, relations = config.train, config.teacher, config.relations
    # Without what a CPU refuses.
    accepted = {
        "train": train.model_copy(update=_without_fp16(precision=train.precision)),
        "teacher": teacher.model_copy(update=_without_fp16(dtype=teacher.dtype)),
        "relations": relations.model_copy(
            update={"backend": "auto"} if relations.backend == "triton" else {}
        ),
    }
    run = resolve(config.model_copy(update=accepted), world_size, device)
    precision = "bf16" if train.precision == "auto" else train.precision
    dtype = precision if teacher.dtype == "auto" else teacher.dtype
    backend = "triton" if relations.backend == "auto" else relations.backend
    update = {
        "train": run.config.train.model_copy(update={"precision": precision}),
        "teacher": run.config.teacher.model_copy(update={"dtype": dtype}),
        "relations": run.config.relations.model_copy(update={"backend": backend}),
    }
    settled = run.config.model_copy(update=update)
    return replace(run, config=settled, stated=config, device_type="cuda")


def _without_fp16(**settings: str) -> dict[str, str]:
    return {name: "bf16" if value == "fp16" else value for name, value in settings.items()}


def _indivisible(batch: int, world_size: int, share: int, micro: int | None) -> str:
    """Return the message for an indivisible global batch, with sizes that would work."""
    unit = world_size * (micro or share)
    batches = " or ".join(
        str(size) for size in (batch // unit * unit, batch // unit * unit + unit) if size
    )
    ranks = counted(world_size, "rank")
    if micro is None or batch % world_size:
        what = ranks if micro is None else f"{ranks} × train.micro_batch_size={micro}"
        fitting = [n for n in range(1, batch + 1) if batch % (n * (micro or 1)) == 0]
        near = [n for n in fitting if n < world_size][-1:]
        near += [n for n in fitting if n > world_size][:1]
        text = f"train.global_batch_size={batch} is not divisible by {what}; use {batches}"
        # A resume refuses another batch.
        return f"{text}, or {' or '.join(map(str, near))} ranks" if near else text
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    nearest = sorted(sorted(sizes, key=lambda size: abs(size - micro))[:4])
    return (
        f"train.global_batch_size={batch} is not divisible by {ranks} × "
        f"train.micro_batch_size={micro}; use "
        f"train.micro_batch_size={' or '.join(map(str, nearest))}, or "
        f"train.global_batch_size={batches}"
    )


def clipped_micro_batch(run: ResolvedRun) -> str | None:
    """Return a warning if `train.micro_batch_size` is more than a rank's share, which is then used.

    Returns None otherwise.
    """
    batch, stated = run.stated.train.global_batch_size, run.stated.train.micro_batch_size
    share = max(1, batch // run.world_size)
    if not isinstance(stated, int) or stated <= share:
        return None
    return (
        f"train.micro_batch_size={stated} is more than a rank's share of train.global_batch_size="
        f"{batch} on {counted(run.world_size, 'rank')}: {share} is used; set "
        f'it to {share} or "auto", or raise train.global_batch_size'
    )


def _compiles(config: DistillConfig, backend: str, device: torch.device) -> bool:
    """Resolve `train.compile`, and check that the compiler it needs is installed."""
    setting, on_gpu = config.train.compile, device.type == "cuda"
    if setting is True and config.run.deterministic:
        raise ConfigError(
            "train.compile=true with run.deterministic=true: what is compiled depends on the step "
            "at which a run was resumed, and so do its last bits; switch one of them off"
        )
    compiles = on_gpu and not config.run.deterministic if setting == "auto" else bool(setting)
    compilers = (
        [os.environ.get("CC", ""), "gcc", "clang"] if on_gpu else [os.environ.get("CXX", "g++")]
    )
    if (compiles or backend == "triton") and not any(map(shutil.which, compilers)):
        raise ConfigError(
            f"train.compile={setting!r} and relations.backend={backend!r} need a compiler, found "
            f"none of {', '.join(filter(None, compilers))}; install one, or set "
            "train.compile=false and relations.backend=reference"
        )
    return compiles
