"""When a run saves checkpoints, and what a failed save leads to.

Inputs: the steps as they are made. Outputs: saves begun and settled at the same steps on all ranks.
Not handled here: writing a checkpoint (`checkpoint.saver`), what is in one (`training.session`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from scaledistill.checkpoint.saver import Outcome
from scaledistill.distributed.ranks import reported_once
from scaledistill.errors import DataError, counted
from scaledistill.run.resume_hint import newest_step, resume_hint
from scaledistill.training.session import Session

log = logging.getLogger(__name__)


class CheckpointSchedule:
    """Saves a session's checkpoints: when due, after a failed save, and before the run ends."""

    def __init__(
        self,
        session: Session,
        at: Callable[[str], None],
        on_saved: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Start with no save under way.

        Args:
            at: called with "save" when one is begun or awaited.
            on_saved: called with the step of each checkpoint that was written.
        """
        self._session, self._at, self._on_saved = session, at, on_saved
        self._settings = session.config.checkpoint
        self._folder = Path(session.config.run.folder)
        self._failed_in_a_row = 0
        self._settle_at: int | None = None

    def after_step(self, *, leaving: bool) -> None:
        """Settle the last save, and save if due or if that one failed. Collective.

        Args:
            leaving: the run ends with this step: save it and wait until it is written.

        Raises:
            DataError: on rank 0, if more than `checkpoint.max_failed_saves` saves in a row failed,
                or the last one of the run.
            PeerError: on the other ranks.
        """
        session, every = self._session, self._settings.every_steps
        due = leaving or (every > 0 and session.step % every == 0)
        if not (due or session.step == self._settle_at):
            return
        self._at("save")
        failed = self._settle(wait=due)
        limit = self._settings.max_failed_saves
        if failed and not leaving and self._failed_in_a_row > limit:
            self._give_up(
                failed,
                f"{counted(self._failed_in_a_row, 'save')} failed in a row, "
                f"checkpoint.max_failed_saves={limit} allows no more",
            )
        if due or failed:
            session.save()
        if leaving and (failed := self._settle(wait=True)):
            self._give_up(failed, "the run ends here")
        # Check the save after this many steps, and again until it has ended.
        patience = max(1, every // 10)
        self._settle_at = session.step + patience if session.saver.pending else None

    def newest(self) -> int | None:
        """Wait for the save under way; return the newest checkpoint's step. Collective."""
        self._settle(wait=True)
        return newest_step(self._folder)

    def _settle(self, *, wait: bool) -> Outcome | None:
        """Return the outcome of the pending save if it has failed."""
        outcome = self._session.saver.settle(wait=wait)
        if outcome is None:
            return None
        if outcome.error is None:
            self._failed_in_a_row = 0
            self._on_saved(outcome.step)
            return None
        self._failed_in_a_row += 1
        if self._session.ranks.is_main:
            log.warning("checkpoint of step %d not saved: %s", outcome.step, outcome.error)
        return outcome

    def _give_up(self, failed: Outcome, why: str) -> None:
        with reported_once(self._session.ranks):
            raise DataError(
                f"the checkpoint of step {failed.step} could not be saved: {failed.error}; {why}. "
                f"{failed.remedy[:1].upper()}{failed.remedy[1:]}; {resume_hint(self._folder)}"
            )
