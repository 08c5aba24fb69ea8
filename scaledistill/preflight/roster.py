"""Which students a run trains: at its start all, and on a resume also which are new or left out.

Inputs: a checkpoint's state and the configuration. Outputs: a `Roster`. Not handled here: whether
the settings of the others are still the same (`preflight.checks`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from scaledistill.config.schedule import from_step
from scaledistill.config.schema import DistillConfig
from scaledistill.errors import ConfigError, counted


@dataclass(frozen=True)
class Roster:
    """The students of a run, by name."""

    first_steps: Mapping[str, int]
    """Of those to train, in the configuration's order: the run's step that is their own step 0."""
    added: tuple[str, ...] = ()
    """Those to train that the checkpoint does not have."""
    removed: tuple[str, ...] = ()
    """Those that the checkpoint trained and the configuration no longer has."""
    dropped: Mapping[str, Mapping[str, Any]] | None = None
    """Those of the configuration that diverged under `train.on_divergence="drop"`: the step, the
    reason and the number of skipped steps of each."""

    @property
    def resumed(self) -> tuple[str, ...]:
        """Those that go on from the checkpoint."""
        return tuple(name for name in self.first_steps if name not in self.added)


def new_roster(config: DistillConfig) -> Roster:
    """Return the roster of a run that starts."""
    return Roster(dict.fromkeys(config.students, 0))


def roster_of(state: Mapping[str, Any], config: DistillConfig) -> Roster:
    """Return the roster of a run that resumes from a checkpoint's state."""
    before, own = state["config"]["students"], student_states(state)
    dropped = {
        name: found for name, found in state.get("dropped", {}).items() if name in config.students
    }
    added = tuple(name for name in config.students if name not in before)
    return Roster(
        first_steps={
            name: state["step"] if name in added else own.get(name, {}).get("first_step", 0)
            for name in config.students
            if name not in dropped
        },
        added=added,
        removed=tuple(name for name in own if name not in config.students),
        dropped=dropped,
    )


def student_states(state: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Return the students' parts of a checkpoint's state, by name.

    Runs of one student wrote theirs beside the rest before there were several.
    """
    if "students" in state:
        return state["students"]
    own = {key: state[key] for key in ("skipped_steps", "best", "last_validation") if key in state}
    by_name = [key for key in ("optimizer_steps", "loss_scaler") if key in state]
    return {
        name: own | {key: state[key][name] for key in by_name}
        for name in state["config"]["students"]
    }


def trained_config(state: Mapping[str, Any], name: str) -> PretrainedConfig | None:
    """Return the model config of a student in a checkpoint's state; None if that does not say.

    Earlier versions did not; nor can a config be read here that needs Python code of its own.
    """
    found = student_states(state).get(name, {}).get("model_config")
    if not found or found["model_type"] not in CONFIG_MAPPING:
        return None
    return CONFIG_MAPPING[found["model_type"]].from_dict(found)


def check_added(roster: Roster, config: DistillConfig, step: int) -> None:
    """Check that the students added at `step` have enough steps left.

    Raises:
        ConfigError: no step is left, or fewer than the warm-up takes.
    """
    for name in roster.added:
        train = from_step(config.for_student(name).train, step)
        if train.max_steps <= 0:
            raise ConfigError(
                f"students.{name} was added, but {config.run.folder} has made all its "
                f"{counted(step, 'step')} (train.max_steps); train it in a run of its own, with "
                "another run.folder"
            )
        if train.warmup_steps > train.max_steps:
            raise ConfigError(
                f"students.{name} was added at step {step}, and its warm-up of "
                f"{counted(train.warmup_steps, 'step')} is more than the {train.max_steps} left; "
                f"set students.{name}.warmup_steps to {train.max_steps} or less"
            )


def roster_notes(roster: Roster, config: DistillConfig, step: int) -> list[str]:
    """Return for people who is new or left out in a run that resumes at `step`."""
    left = counted(config.train.max_steps - step, "step")
    return [
        *(
            f"student {name} is new: its own step 0 is step {step} of the run, and its warm-up and "
            f"decay are in the {left} left"
            for name in roster.added
        ),
        *(
            f"student {name} is not in the configuration any more: it is not trained after step "
            f"{step}; its exports are kept, its state only in the checkpoints up to this step"
            for name in roster.removed
        ),
        *(
            f"student {name} was dropped at step {found['step']} and stays out: {found['reason']}; "
            "to train it again, give it another name"
            for name, found in (roster.dropped or {}).items()
        ),
    ]
