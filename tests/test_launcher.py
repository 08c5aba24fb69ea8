from __future__ import annotations

import os

import pytest

from scaledistill.distributed.launcher import launcher_facts
from scaledistill.errors import ConfigError

TWO = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher of the tests themselves."""
    markers = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_",
        "MASTER_",
        "SLURM_",
        "PMI_",
        "OMPI_",
        "MV2_",
        "ACCELERATE_",
    )
    monkeypatch.setattr(
        os,
        "environ",
        {key: text for key, text in os.environ.items() if not key.startswith(markers)},
    )


def test_alone_and_among_others() -> None:
    assert launcher_facts() == (0, 1, 0, 1)
    os.environ.update(TWO)
    assert launcher_facts() == (1, 2, 1, 2)
    # As deepspeed says it.
    os.environ.update({"WORLD_SIZE": "6", "LOCAL_RANK": "0", "LOCAL_SIZE": "3"})
    assert launcher_facts() == (1, 6, 0, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"RANK": "x"},
            "sets RANK='x', expected a whole number from 0 up; start the run with `deepspeed`",
        ),
        ({"RANK": "-1"}, "sets RANK='-1', expected a whole number from 0 up"),
        ({"RANK": ""}, "sets RANK='', expected a whole number from 0 up"),
        ({"RANK": "2"}, "sets RANK=2 and WORLD_SIZE=2, expected RANK to be from 0 to 1"),
        ({"WORLD_SIZE": "0"}, "sets WORLD_SIZE='0', expected a whole number from 1 up"),
        ({"WORLD_SIZE": "2.0"}, r"sets WORLD_SIZE='2\.0', expected a whole number"),
        ({"LOCAL_RANK": "²"}, "sets LOCAL_RANK='²', expected a whole number"),
        (
            {"LOCAL_RANK": "5"},
            "sets LOCAL_RANK=5 and WORLD_SIZE=2, expected LOCAL_RANK to be from 0 to 1",
        ),
        (
            {"LOCAL_WORLD_SIZE": "1"},
            "sets LOCAL_RANK=1 and LOCAL_WORLD_SIZE=1, expected LOCAL_RANK to be from 0 to 0",
        ),
        ({"MASTER_PORT": "abc"}, "sets MASTER_PORT='abc', expected a whole number from 1 to 65535"),
        ({"MASTER_PORT": "0"}, "sets MASTER_PORT=0, expected a whole number from 1 to 65535"),
        (
            {"MASTER_PORT": "70000"},
            "sets MASTER_PORT='70000', expected a whole number from 1 to 65535",
        ),
        (
            {"MASTER_ADDR": " "},
            "sets MASTER_ADDR='', expected the name or address of rank 0's host",
        ),
    ],
)
def test_variables_that_cannot_be(changes: dict[str, str], message: str) -> None:
    os.environ.update({**TWO, **changes})
    with pytest.raises(ConfigError, match=f"^the environment {message}"):
        launcher_facts()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"SLURM_PROCID": "1"},
        {"SLURM_STEP_ID": "3", "SLURM_NTASKS": "64", "SLURM_STEP_NUM_TASKS": "2"},
        {"SLURM_STEP_ID": "", "SLURM_PROCID": "1"},
    ],
)
def test_tasks_of_srun_that_do_not_know_of_each_other(changes: dict[str, str]) -> None:
    os.environ.update({**STEP, **changes})
    with pytest.raises(
        ConfigError,
        match=r"^this is one of 2 tasks of `srun`.*: "
        r"each would be .* launch/slurm\.sbatch .*torchrun",
    ):
        launcher_facts()


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"},  # salloc's shell
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # a batch script
        # The same, of a Slurm that numbers its step.
        {**STEP, "SLURM_NTASKS": "8", "SLURM_STEP_ID": "4294967291"},
        # Salloc on a node.
        {**STEP, "SLURM_NTASKS": "8", "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},
        {**STEP, "SLURM_NTASKS": "1"},
        # Srun --ntasks=1 in a larger job.
        {**STEP, "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": ""},
    ],
)
def test_one_process_under_slurm_or_mpi(variables: dict[str, str]) -> None:
    os.environ.update(variables)
    assert launcher_facts() == (0, 1, 0, 1)


def test_torchrun_in_a_slurm_task() -> None:
    os.environ.update({**STEP, **TWO})
    assert launcher_facts().world_size == 2


def test_processes_of_mpi() -> None:
    os.environ["OMPI_COMM_WORLD_SIZE"] = "4"
    with pytest.raises(
        ConfigError, match=r"^MPI started 4 processes \(OMPI_COMM_WORLD_SIZE\), none of which knows"
    ):
        launcher_facts()


def test_accelerate_starts_one_process_on_cpus(caplog: pytest.LogCaptureFixture) -> None:
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    assert launcher_facts().world_size == 1
    assert caplog.messages == []
    # What it adds for --num_processes 2.
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
    assert launcher_facts().world_size == 1
    assert "accelerate launch was asked for several processes and started one" in caplog.text
