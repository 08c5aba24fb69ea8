"""Errors of NCCL, gloo and CUDA: which mean a lost rank, and what is said of the others."""

from __future__ import annotations

import pytest
import torch

from scaledistill.distributed.failures import explain, explain_lost_peer

NCCL = "[rank1]: NCCL error in: ../ProcessGroupNCCL.cpp:77, {}, NCCL version 2.28.9\n"
REMOTE = NCCL.format("remote process exited or there was a network error") + (
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting "
    "prematurely.\nLast error:\nsocketProgress: Connection closed by remote peer node2<51234>"
)
LOCAL = NCCL.format("unhandled cuda error") + (
    "ncclUnhandledCudaError: Call to CUDA library failed.\nLast error:\n"
    "Cuda failure 2 'out of memory'"
)
DUPLICATE = NCCL.format("invalid usage") + (
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
    "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (REMOTE, "socketProgress: Connection closed by remote peer node2<51234>"),
        ("NCCL communicator was aborted on rank 1.", "NCCL communicator was aborted on rank 1."),
        ("[../gloo/pair.cc:553] Connection closed by peer [::1]:1", "Connection closed by peer"),
    ],
)
def test_a_lost_rank(text: str, reason: str) -> None:
    message = explain_lost_peer(RuntimeError(text))
    assert message is not None
    assert message == explain(RuntimeError(text))
    assert message.startswith(f"another rank ended or cannot be reached ({reason}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LOCAL, "Cuda failure 2 'out of memory'"),
        (DUPLICATE, "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"),
    ],
)
def test_nccl_s_other_errors_are_of_this_rank(
    text: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    error = torch.distributed.DistBackendError(text)
    assert explain_lost_peer(error) is None
    message = explain(error)
    assert message is not None
    assert message.startswith("rank 1 on ")
    assert message.endswith(f": NCCL failed: {reason}; NCCL_DEBUG=INFO shows more")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported …"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_that_does_not_suffice(error: RuntimeError) -> None:
    message = explain(error)
    assert message is not None
    assert "the GPU's memory does not suffice (CUDA " in message
    assert 'lower train.micro_batch_size or set it to "auto"' in message


def test_errors_that_are_not_explained() -> None:
    for error in (RuntimeError("a shape"), ValueError("NCCL"), KeyboardInterrupt(), MemoryError()):
        assert explain(error) is None
