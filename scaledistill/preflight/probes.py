"""What `scaledistill doctor` tries with torch, each in a process of its own.

Inputs: the name of a probe, as the only argument. Outputs: its facts as a line of JSON, or the
innermost error on stderr and exit code 1. Not handled here: judging the facts (`preflight.doctor`).

Legend: B sequences, T tokens, D width.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

KERNEL_TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
"""Relative errors of loss and gradients that wrong code would exceed; the tests' are tighter."""


def torch_facts() -> dict[str, Any]:
    """Return torch's version and builds, and the GPUs, each tried with a matrix product."""
    import torch
    import torch.distributed as dist

    reason, gpus = "", []
    if torch.version.cuda:
        try:
            torch.cuda.init()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
    for index in range(torch.cuda.device_count()) if not reason else ():
        properties, wrong = torch.cuda.get_device_properties(index), ""
        try:
            if not multiplies(torch.device("cuda", index)):
                wrong = "a product of matrices is wrong"
        except RuntimeError as error:
            wrong = str(error).partition("\n")[0]
        gpus.append(
            {
                "name": properties.name,
                "capability": [properties.major, properties.minor],
                "memory_bytes": properties.total_memory,
                "error": wrong,
            }
        )
    with_nccl = torch.version.cuda and dist.is_available() and dist.is_nccl_available()
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "nccl": list(torch.cuda.nccl.version()) if with_nccl else None,
        "reason": reason,
        "gpus": gpus,
    }


def multiplies(device: torch.device) -> bool:
    """Return whether a device gives the right product of two matrices in fp16."""
    import torch

    ones = torch.ones(64, 64, device=device, dtype=torch.float16)
    return bool((ones @ ones == 64).all())


def relation_kernels() -> dict[str, Any]:
    """Return the errors of the Triton backend's loss and gradients, by dtype.

    They are relative to those of the reference backend in float64 on the same numbers.
    """
    import torch

    from scaledistill.relations import QKV, relation_loss

    # On a CPU only Triton's interpreter runs the kernels (TRITON_INTERPRET=1), for tests.
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    generator = torch.Generator().manual_seed(0)
    B, T, heads = 2, 100, 4
    mask_BT = torch.arange(T) < torch.tensor([[T], [T - 17]])

    def model(width: int, dtype: torch.dtype) -> list[torch.Tensor]:
        tensors = torch.randn(3, B, T, width, generator=generator, dtype=torch.float64)
        return list(tensors.to(device, dtype).unbind())

    def loss_and_gradients(
        teacher: list[torch.Tensor], student: list[torch.Tensor], backend: str
    ) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in student]
        total = relation_loss(
            QKV(*teacher),
            QKV(*leaves),
            num_heads=heads,
            pairs={"qq": 1.0, "kk": 1.0, "vv": 1.0},
            mask_BT=mask_BT.to(device),
            backend=backend,
        ).total
        total.backward()
        return [total.detach(), *(x.grad for x in leaves if x.grad is not None)]

    errors = {}
    # Triton's interpreter multiplies the bits of bf16 as if they were integers.
    for name in KERNEL_TOLERANCES if on_gpu else ("float32",):
        dtype = getattr(torch, name)
        teacher, student = model(96, dtype), model(48, dtype)
        found = loss_and_gradients(teacher, student, "triton")
        expected = loss_and_gradients(
            [x.double() for x in teacher], [x.double() for x in student], "reference"
        )
        errors[name] = max(
            ((one.double() - other).norm() / other.norm()).item()
            for one, other in zip(found, expected, strict=True)
        )
    where = torch.cuda.get_device_name(device) if on_gpu else "the CPU"
    return {"device": where, "errors": errors, "tolerances": KERNEL_TOLERANCES}


def deepspeed_step() -> dict[str, Any]:
    """Make an optimizer step of a tiny student under ZeRO-2 with offload."""
    import torch
    from transformers import BertConfig

    from scaledistill.config.load import parse_config
    from scaledistill.distributed.ranks import process_group
    from scaledistill.engines import create_engine
    from scaledistill.models.architectures import build_encoder
    from scaledistill.models.view import capture_view
    from scaledistill.preflight.estimate import sample_tokens
    from scaledistill.preflight.resolve import resolve

    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    config = parse_config(
        {
            "run": {"folder": "unused"},
            "teacher": {"model": "unused", "layer": 1},
            "students": {"s": {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2}},
            "relations": {"num_heads": 2},
            "data": {"train": "unused", "sequence_length": 16},
            "train": {
                "global_batch_size": 2,
                "max_steps": 1,
                "learning_rate": 1e-3,
                "warmup_steps": 0,
                "compile": False,
            },
            "engine": {"deepspeed": {"zero_optimization": zero}},
        }
    )
    shape = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    with process_group(60) as ranks:
        run = resolve(config, 1, ranks.device)
        engine = create_engine(run, capture_view(build_encoder(shape), 1), ranks)
        before = {name: x.clone() for name, x in engine.weights().items()}
        output = engine.forward(sample_tokens(run.config.data, 2, ranks.device))
        engine.backward(sum(x.float().square().mean() for x in output), last=True)  # type: ignore[arg-type]
        if engine.step(1e-3).skipped:
            raise RuntimeError("the step was skipped: a gradient is not finite")
        if all(torch.equal(before[name], x) for name, x in engine.weights().items()):
            raise RuntimeError("a step left all weights as they were")
        return {"device": ranks.device.type}


def cpu_adam() -> dict[str, Any]:
    """Build, load and try DeepSpeed's CPU Adam."""
    from scaledistill.engines.zero import cpu_adam_error

    return {"error": cpu_adam_error()}


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": torch_facts,
    "kernels": relation_kernels,
    "deepspeed": deepspeed_step,
    "cpu_adam": cpu_adam,
}


def main(name: str) -> int:
    """Run a probe and return the exit code."""
    try:
        facts = PROBES[name]()
    except Exception as error:  # noqa: BLE001 - reported by the process that started this one
        root = _root_cause(error)
        first = str(root).strip().partition("\n")[0]
        sys.stderr.write(f"\n{type(root).__name__}: {first}\n")
        return 1
    sys.stdout.write(f"\n{json.dumps(facts)}\n")
    return 0


def _root_cause(error: BaseException) -> BaseException:
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return _root_cause(before) if before else error
