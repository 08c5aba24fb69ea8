"""What the errors of PyTorch, NCCL and gloo mean for the user of a run.

Inputs: exceptions. Outputs: messages. Not handled here: naming the rank that is lost
(`distributed.watchdog`).
"""

from __future__ import annotations

import socket

import torch

from scaledistill.distributed.launcher import stated_rank

_LOST = (
    *("ncclRemoteError", "remote process", "was aborted", "Broken pipe"),
    *("Connection closed", "Connection reset", "Connection refused"),
)
"""NCCL's words for a peer that is gone; its other errors are this rank's own."""
_OUT_OF_MEMORY = (
    *("CUDA out of memory", "CUDA error: out of memory", "Triton Error [CUDA]: out of memory"),
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def explain(error: BaseException) -> str | None:
    """Return what to tell the user of an error that is no fault of the program; None for others."""
    if lost := explain_lost_peer(error):
        return lost
    where = f"rank {stated_rank()} on {socket.gethostname()}"
    if isinstance(error, RuntimeError) and "NCCL" in str(error):
        return f"{where}: NCCL failed: {_reason(error)}; NCCL_DEBUG=INFO shows more"
    if is_out_of_memory(error):
        return (
            f"{where}: the GPU's memory does not suffice ({_reason(error)}); lower "
            'train.micro_batch_size or set it to "auto"; `scaledistill estimate --config FILE` '
            "shows which part is large"
        )
    return None


def explain_lost_peer(error: BaseException) -> str | None:
    """Return a message if an error means that another rank is lost; None for other errors."""
    text = str(error)
    is_lost = "NCCL" in text and any(part in text for part in _LOST)
    if isinstance(error, RuntimeError) and (
        is_lost or "gloo" in text or "Connection closed by peer" in text
    ):
        return (
            f"another rank ended or cannot be reached ({_reason(error)}); its own message says why"
        )
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a GPU's memory does not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
    )


def _reason(error: BaseException) -> str:
    """Return the line that says most: what follows NCCL's "Last error:", or else the first one."""
    text = str(error).strip()
    _, found, last = text.partition("Last error:\n")
    lines = (last if found else text).splitlines() or [type(error).__name__]
    return lines[0].rpartition("] ")[2][:200]
