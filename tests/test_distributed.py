from __future__ import annotations

import os
import socket
import subprocess
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from scaledistill.distributed.ranks import (
    CPU_BF16_VARIABLE,
    REPORT_SECONDS,
    Ranks,
    all_reduce_sum,
    broadcast_object,
    failing_together,
    gather_objects,
    has_fast_bf16,
    process_group,
    reported_once,
    resolve_precision,
    resolve_teacher_dtype,
)
from scaledistill.errors import ConfigError, DataError, DivergedError, PeerError

LAUNCHER = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
)
CPU = torch.device("cpu")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """This process's environment without a launcher's variables; what is set in it is gone after
    the test.
    """
    monkeypatch.setattr(
        os, "environ", {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    )
    # Else the number of threads would change under the other tests.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return os.environ  # type: ignore[return-value]


def test_plain_python_is_one_rank(environment: dict[str, str]) -> None:
    before = dict(environment) | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "DS_ACCELERATOR": "cpu"}
    with process_group(60) as ranks:
        assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.is_main) == (0, 1, 0, True)
        assert ranks.device == CPU
        assert dist.get_world_size() == 1
        assert all_reduce_sum(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
        assert broadcast_object("x") == "x"
        assert gather_objects("x") == ["x"]
        assert {key: os.environ[key] for key in LAUNCHER[:4]} == {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
        }
    assert not dist.is_initialized()
    assert dict(os.environ) == before  # another library would ask for the launcher


def test_a_group_that_stands_is_used_and_left(environment: dict[str, str]) -> None:
    with process_group(60):
        with process_group(60) as inner:
            assert (inner.rank, inner.world_size) == (0, 1)
        assert dist.is_initialized()
    assert not dist.is_initialized()


def test_the_group_ends_with_an_error(environment: dict[str, str]) -> None:
    with pytest.raises(ZeroDivisionError), process_group(60):
        raise ZeroDivisionError
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"RANK": "0"},
            "the environment sets RANK but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; "
            "start",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            "the environment sets RANK, WORLD_SIZE, LOCAL_RANK but not MASTER_ADDR, MASTER_PORT; "
            "start the run with",
        ),
        (
            {"WORLD_SIZE": "2", "MASTER_PORT": "1"},
            "sets WORLD_SIZE, MASTER_PORT but not RANK, LOCAL_RANK, MASTER_ADDR",
        ),
    ],
)
def test_incomplete_launcher(
    given: dict[str, str], message: str, environment: dict[str, str]
) -> None:
    environment.update(given)
    with pytest.raises(ConfigError, match=message), process_group(60):
        pytest.fail("a group was made")


def test_more_ranks_than_gpus(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    environment.update(
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(
            ConfigError, match=r"local rank 3 has no GPU of its own: this process sees 2 .*; start"
        ),
        process_group(60),
    ):
        pytest.fail("a group was made")


@pytest.mark.parametrize("torchrun", [False, True])
def test_a_task_that_sees_its_own_gpu_only(
    torchrun: bool, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's --gpus-per-task=1: DeepSpeed takes the GPU that LOCAL_RANK names."""
    environment.update(
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    )
    environment["SLURM_PROCID"] = "3"
    if torchrun:
        environment["TORCHELASTIC_RUN_ID"] = "1"
    chosen: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    def join(backend: str, timeout: object) -> None:
        chosen.extend([backend, os.environ["LOCAL_RANK"]])
        raise ConfigError("enough")

    monkeypatch.setattr(dist, "init_process_group", join)
    expected = "local rank 3 has no GPU of its own" if torchrun else "enough"
    with pytest.raises(ConfigError, match=expected), process_group(60):
        pytest.fail("a group was made")
    assert chosen == ([] if torchrun else [0, "nccl", "0"])


def test_threads_are_shared_among_the_ranks_here(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    del environment["OMP_NUM_THREADS"]
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    with process_group(60):
        pass
    environment.update(dict.fromkeys(LAUNCHER, "0") | {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "3"})
    with process_group(60):
        pass
    assert threads == [8, 2]


@pytest.mark.parametrize("chosen", [True, False])
def test_torchrun_s_one_thread_is_not_the_user_s_choice(
    chosen: bool, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment.update({"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"})
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    given = {"OMP_NUM_THREADS": "1"} if chosen else {}
    with subprocess.Popen(["/bin/sleep", "60"], env=given) as torchrun:
        monkeypatch.setattr(os, "getppid", lambda: torchrun.pid)
        try:
            with process_group(60):
                pass
        finally:
            torchrun.kill()
    assert threads == ([] if chosen else [8])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stated_precision_stays(precision: str) -> None:
    assert resolve_precision(precision, CPU) == precision


@pytest.mark.parametrize(
    ("amx", "avx512", "expected"), [(0, 0, "fp32"), (1, 0, "bf16"), (0, 1, "bf16")]
)
def test_automatic_precision_on_a_cpu(
    amx: int, avx512: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher's; a student's is fp32 on every CPU."""
    monkeypatch.delenv(CPU_BF16_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512))
    assert has_fast_bf16(CPU) is (expected == "bf16")
    assert resolve_teacher_dtype("auto", "auto", CPU) == expected
    assert resolve_precision("auto", CPU) == "fp32"


def test_what_is_stated_of_a_cpu_counts(fast_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: not fast_bf16)
    assert has_fast_bf16(CPU) is fast_bf16
    monkeypatch.setenv(CPU_BF16_VARIABLE, "yes")
    with pytest.raises(
        ConfigError,
        match=r"^SCALEDISTILL_CPU_BF16='yes' in the environment; expected 0 or 1, or unset",
    ):
        has_fast_bf16(CPU)


@pytest.mark.parametrize(
    ("setting", "precision", "expected"),
    [
        ("auto", "fp32", "fp32"),
        ("auto", "bf16", "bf16"),
        ("fp32", "bf16", "fp32"),
        ("bf16", "auto", "bf16"),
    ],
)
def test_a_stated_precision_is_the_teacher_s(
    setting: str, precision: str, expected: str, fast_bf16: bool
) -> None:
    assert resolve_teacher_dtype(setting, precision, CPU) == expected


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_automatic_precision_on_a_gpu(
    native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert resolve_precision("auto", torch.device("cuda")) == expected
    assert resolve_precision("fp16", torch.device("cuda")) == "fp16"


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^precision='fp16' needs a GPU, found only a CPU; use bf16 or fp32$",
    ):
        resolve_precision("fp16", CPU)
    with pytest.raises(
        ConfigError, match=r"^dtype='fp16' needs a GPU, found only a CPU; use bf16 or fp32$"
    ):
        resolve_teacher_dtype("fp16", "auto", CPU)


@pytest.mark.parametrize(
    "error", [ConfigError("no"), DataError("no"), DivergedError("no")], ids=type
)
def test_reported_once(error: ConfigError | DataError | DivergedError) -> None:
    with pytest.raises(type(error)) as first, reported_once(Ranks(0, 2, 0, CPU)):
        raise error
    assert first.value is error
    with pytest.raises(PeerError, match=r"^no$") as second, reported_once(Ranks(1, 2, 1, CPU)):
        raise error
    assert second.value.exit_code == error.exit_code
    with pytest.raises(ZeroDivisionError), reported_once(Ranks(1, 2, 1, CPU)):
        raise ZeroDivisionError  # a defect is shown by every rank that has it


def on_two_ranks() -> dict[str, Any]:
    with process_group(60) as ranks:

        def attempt(
            failing: set[int], kind: type[Exception] = DataError
        ) -> tuple[str, str, int] | None:
            try:
                with failing_together():
                    if ranks.rank in failing:
                        raise kind(f"rank {ranks.rank} says no")
            except (ConfigError, DataError, PeerError) as error:
                return type(error).__name__, str(error), error.exit_code
            return None

        return {
            "sum": all_reduce_sum(
                torch.tensor([1.0, float(ranks.rank)], dtype=torch.float64)
            ).tolist(),
            "broadcast": broadcast_object({"from": ranks.rank}),
            "gathered": gather_objects((ranks.rank, "x" * ranks.rank)),
            "none": attempt(set()),
            "second": attempt({1}),
            "first": attempt({0}, ConfigError),
            "both": attempt({0, 1}),
            "still": gather_objects(ranks.rank),
        }


def test_two_ranks() -> None:
    first, second = run_ranks(on_two_ranks, 2)
    for key, value in {
        "sum": [2.0, 1.0],
        "broadcast": {"from": 0},
        "gathered": [(0, ""), (1, "x")],
        "none": None,
        "still": [0, 1],
    }.items():
        assert first[key] == second[key] == value
    assert first["second"] == ("DataError", f"rank 1 on {socket.gethostname()}: rank 1 says no", 3)
    assert second["second"] == ("PeerError", "rank 1 says no", 3)
    assert first["first"] == ("ConfigError", "rank 0 says no", 2)
    assert second["first"] == ("PeerError", "rank 0 says no", 2)
    assert (first["both"][1], second["both"][0]) == ("rank 0 says no", "PeerError")


ALONE = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_a_port_that_is_in_use(environment: dict[str, str]) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        environment.update({**ALONE, "WORLD_SIZE": "2", "MASTER_PORT": str(port)})
        with (
            pytest.raises(
                DataError,
                match=rf"^port {port} on \S+, where .* is in use by another process\. "
                ".* --master_port",
            ),
            process_group(60),
        ):
            pytest.fail("a group was made")


def test_a_rank_0_that_does_not_answer(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    def refused(*_: object, **__: object) -> None:
        raise dist.DistNetworkError("The client socket has failed to connect\nand more")

    monkeypatch.setattr(dist, "init_process_group", refused)
    monkeypatch.setattr("scaledistill.distributed.ranks.time.sleep", pauses.append)
    for local_size, expected in (("2", [REPORT_SECONDS]), ("1", [])):
        environment.update(
            {**ALONE, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": local_size}
        )
        with (
            pytest.raises(
                DataError, match=r"^rank 1 on \S+ cannot meet .* at 127.0.0.1:29500 \(The client"
            ),
            process_group(9),
        ):
            pytest.fail("a group was made")
        assert pauses == expected, "rank 0 of the same machine reports for both"
        pauses.clear()
