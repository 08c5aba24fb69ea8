"""Experiment trackers, through accelerate: TensorBoard, W&B, MLflow, trackio and others.

Inputs: the run's folder and settings, then rows of metrics. Outputs: what each tracker stores, and
`trackers.json` in the run folder, so that a resumed run continues the same tracker runs. A tracker
that fails is reported once and then dropped: training does not depend on it. Only rank 0 creates
`Trackers`.
"""

from __future__ import annotations

import inspect
import json
import logging
import netrc
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from configparser import ConfigParser, Error
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from scaledistill.errors import SettingError
from scaledistill.storage.files import read_json, write_json
from scaledistill.storage.remote import without_credentials

log = logging.getLogger(__name__)

RECORD = "trackers.json"
LAUNCHED = (
    *("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    "ACCELERATE_USE_SAGEMAKER",
)
"""The variables by which accelerate learns of other processes."""


def check_trackers(trackers: Iterable[str]) -> None:
    """Check that the trackers can be used.

    Raises:
        SettingError: accelerate has no such tracker, its package is not installed, or W&B has no
            key.
    """
    for name in trackers:
        from accelerate import tracking  # imported here because it takes seconds

        if name not in tracking.LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(tracking.LOGGER_TYPE_TO_CLASS))
            raise SettingError(
                "trackers", expected=f": unknown tracker {name!r}", remedy=f"known: {known}"
            )
        built_in = tracking.LOGGER_TYPE_TO_CLASS[name].__module__ == tracking.__name__
        available = [
            getattr(tracker, "value", tracker) for tracker in tracking.get_available_trackers()
        ]
        if built_in and name not in available:
            raise SettingError(
                "trackers",
                expected=f": {name!r} is not installed",
                remedy="pip install it or remove it",
            )
        if built_in and name == "wandb" and not _has_wandb_key():
            raise SettingError(
                "trackers",
                expected=": 'wandb' has no API key",
                remedy="run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline to keep "
                "the figures on this machine",
            )


def _has_wandb_key() -> bool:
    """Return whether W&B has a key or needs none.

    Looks where W&B itself does: in environment variables, its settings files and netrc.
    """
    given = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
    if given:
        return True
    mode, host = os.environ.get("WANDB_MODE", ""), os.environ.get("WANDB_BASE_URL", "")
    configured = Path(os.environ.get("WANDB_CONFIG_DIR") or Path("~/.config/wandb").expanduser())
    # These files are written by `wandb offline` and the like.
    for path in (configured / "settings", Path("wandb/settings")):
        try:
            settings = ConfigParser(interpolation=None)
            settings.read_string(path.read_text())
            mode = mode or settings.get("default", "mode", fallback="")
            host = host or settings.get("default", "base_url", fallback="")
        except (OSError, Error, UnicodeDecodeError):
            continue
    if mode in ("offline", "dryrun", "disabled") or os.environ.get(
        "WANDB_DISABLED", ""
    ).lower() in ("true", "1"):
        return True
    names = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for name in names:
        try:
            if netrc.netrc(Path(name).expanduser()).authenticators(
                urlsplit(host).hostname or "api.wandb.ai"
            ):
                return True
        except (OSError, netrc.NetrcParseError, RuntimeError):  # RuntimeError: no home folder
            continue
    return False


class Trackers:
    """The trackers of a run; `log` and `finish` never raise."""

    def __init__(
        self,
        names: Iterable[str],
        folder: Path,
        config: Mapping[str, Any],
        *,
        project: str | None = None,
        run_name: str | None = None,
        resumed_at: int = 0,
    ) -> None:
        """Start the trackers, each continuing the run that `trackers.json` names, if any.

        Args:
            config: the run's settings; credentials in URLs are left out.
            resumed_at: the step that the run resumes from. TensorBoard then hides later ones.

        Raises:
            ConfigError: see `check_trackers`.
        """
        names = list(names)
        check_trackers(names)
        self._folder = folder
        self._project, self._run_name = (
            project or folder.resolve().name,
            run_name or folder.resolve().name,
        )
        self._is_named, self._resumed_at = run_name is not None, resumed_at
        self._known = read_json(folder / RECORD) or {}
        self._running: dict[str, Any] = {}
        self._failed: dict[str, Any] = {}
        self._runtime_is_ours = False
        for name in names:
            self._attempt(name, "start", self._start, name, config)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Pass a step's metrics to every tracker."""
        for name, tracker in list(self._running.items()):
            self._attempt(
                name, f"take the figures of step {step}", tracker.log, dict(values), step=step
            )

    def finish(self) -> None:
        """Close every tracker; close the run's own files first, since this may take long."""
        try:
            # Failed trackers may hold files open; their failure has been reported already.
            for tracker in self._failed.values():
                try:
                    tracker.finish()
                except (Exception, SystemExit):  # noqa: BLE001 - any package's errors
                    continue
            for name, tracker in list(self._running.items()):
                self._attempt(name, "finish", tracker.finish)
        finally:
            if self._runtime_is_ours:
                _end_runtime()
        self._running, self._failed, self._runtime_is_ours = {}, {}, False

    def _attempt(
        self, name: str, what: str, action: Callable[..., Any], *arguments: Any, **options: Any
    ) -> None:
        try:
            action(*arguments, **options)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - any package's errors; some exit
            reason = " ".join(str(error).split())[:300]
            log.warning(
                "logging.trackers: %s could not %s (%s: %s); the run continues without it, "
                "metrics.jsonl has every figure",
                *(name, what, type(error).__name__, reason),
            )
            if tracker := self._running.pop(name, None):
                self._failed[name] = tracker

    def _start(self, name: str, config: Mapping[str, Any]) -> None:
        from accelerate import tracking

        known = tracking.LOGGER_TYPE_TO_CLASS[name]
        self._runtime_is_ours = _start_runtime() or self._runtime_is_ours
        accepted = inspect.signature(known.__init__).parameters.values()
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted)
        named = {parameter.name for parameter in accepted}
        options = self._options(name)
        options = {key: value for key, value in options.items() if takes_any or key in named}
        if known.requires_logging_directory:  # a folder in the run's folder, as if for a project
            tracker = known(self._run_name, logging_dir=str(self._folder), **options)
        else:
            tracker = known(self._project, **options)
        tracker.start()
        self._running[name] = tracker
        continued = name in self._known
        self._remember(name, tracker, options)
        if not continued:  # MLflow refuses a parameter that changes, such as a moved folder
            tracker.store_init_configuration({"config": without_credentials(json.dumps(config))})

    def _options(self, name: str) -> dict[str, Any]:
        """Return the options that start a tracker's run, or continue its earlier one."""
        before = self._known.get(name)
        # The trackers' own variables name the run unless logging.run_name does.
        own_names = {"wandb": "WANDB_NAME", "mlflow": "MLFLOW_RUN_NAME"}
        run_name = os.environ.get(own_names.get(name, ""), "") if not self._is_named else ""
        run_name = run_name or self._run_name
        if name == "wandb":
            identity = os.environ.get("WANDB_RUN_ID") or before or uuid.uuid4().hex[:16]
            return {"id": identity, "resume": "allow", "name": run_name}
        if name == "mlflow":
            return {"run_id": before} if before else {"run_name": run_name}
        if name == "trackio":
            return {"name": before or self._run_name, "resume": "allow" if before else "never"}
        if name == "tensorboard" and self._resumed_at:
            return {"purge_step": self._resumed_at + 1}
        return {}

    def _remember(self, name: str, tracker: Any, options: Mapping[str, Any]) -> None:
        """Store the identity of a tracker's run, so that a resumed run can continue it."""
        if name == "wandb":
            identity = options.get("id")
        elif name == "mlflow":
            identity = getattr(
                getattr(getattr(tracker, "active_run", None), "info", None), "run_id", None
            )
        elif name == "trackio":  # it replaces a name that is already taken
            identity = getattr(getattr(tracker, "run", None), "name", None) or options.get("name")
        else:
            return
        if identity:
            self._known[name] = identity
            write_json(self._folder / RECORD, self._known)


def _start_runtime() -> bool:
    """Start accelerate's runtime, which its trackers need; return False if it runs already.

    For one process on the CPU, whatever launched the run: only rank 0 has trackers, and accelerate
    must neither join the run's processes nor choose their device.
    """
    from accelerate import PartialState

    if PartialState._shared_state:
        return False
    hidden = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ}
    try:
        PartialState(cpu=True)
    finally:
        os.environ.update(hidden)
    return True


def _end_runtime() -> None:
    """End accelerate's runtime, so that what comes after the run can start its own."""
    from accelerate import PartialState

    PartialState._reset_state()
