"""A run's models from the hub, fetched by the first rank of each machine; the others use what it
found.

Inputs: names and ranks. Outputs: nothing; `resolve_folder` knows the folders from then on, or why
there are none. A thousand ranks that ask at once would be refused by the hub.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress

from scaledistill.config.schema import DistillConfig
from scaledistill.data.tokenizer import TOKENIZER_FILES
from scaledistill.distributed.ranks import Ranks, gather_objects
from scaledistill.models.hub import known_models, learn
from scaledistill.models.teacher import CONFIG_FILES, WEIGHT_FILES, resolve_folder
from scaledistill.storage.files import is_path

NO_NAMES = ("random", "teacher")
"""What `init` may be besides a folder or a name."""


def fetch_configs(config: DistillConfig, ranks: Ranks) -> None:
    """Fetch what the checks before a run read of its models; a failure is left to them.
    Collective.
    """
    teacher = (config.teacher.model, config.teacher.revision)
    inits = [(spec.init, None) for spec in config.students.values()]
    _fetch([teacher, *inits], (*CONFIG_FILES, *TOKENIZER_FILES), ranks)


def fetch_weights(model: str, revision: str | None, ranks: Ranks) -> None:
    """Fetch a model's weights; a failure is left to whoever loads them. Collective."""
    _fetch([(model, revision)], WEIGHT_FILES, ranks)


def _fetch(models: Iterable[tuple[str, str | None]], patterns: Sequence[str], ranks: Ranks) -> None:
    is_first = ranks.local_rank == 0
    for model, revision in models if is_first else ():
        if not is_path(model) and model not in NO_NAMES:
            with suppress(Exception):  # raised again, on all ranks, where the model is needed
                resolve_folder(model, revision, patterns)
    here = socket.gethostname()
    # All ranks meet here, whatever their names are: a teacher's folder may differ from machine to
    # machine.
    for host, known in gather_objects((here, known_models() if is_first else {})):
        if host == here and not is_first:
            learn(known)
