"""Fetch a run's models from the hub on the first rank of each machine, for all ranks there.

Inputs: names and ranks. Outputs: nothing; afterwards `resolve_folder` knows the folders, or why
there are none. The hub would refuse the requests of a thousand ranks at once.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress

from scaledistill.config.schema import INIT_WORDS, DistillConfig
from scaledistill.data.tokenizer import TOKENIZER_FILES
from scaledistill.distributed.ranks import Ranks, gather_objects
from scaledistill.models.hub import known_models, learn
from scaledistill.models.teacher import CONFIG_FILES, WEIGHT_FILES, resolve_folder
from scaledistill.storage.files import is_path


def fetch_configs(config: DistillConfig, ranks: Ranks) -> None:
    """Fetch the model files that the checks read; the checks report failures. Collective."""
    teacher = (config.teacher.model, config.teacher.revision)
    inits = [(spec.init, None) for spec in config.students.values()]
    _fetch([teacher, *inits], (*CONFIG_FILES, *TOKENIZER_FILES), ranks)


def fetch_weights(model: str, revision: str | None, ranks: Ranks) -> None:
    """Fetch a model's weights; failures are raised when they are loaded. Collective."""
    _fetch([(model, revision)], WEIGHT_FILES, ranks)


def _fetch(models: Iterable[tuple[str, str | None]], patterns: Sequence[str], ranks: Ranks) -> None:
    is_first = ranks.local_rank == 0
    for model, revision in models if is_first else ():
        if not is_path(model) and model not in INIT_WORDS:
            with suppress(Exception):  # raised again, on all ranks, when the model is needed
                resolve_folder(model, revision, patterns)
    here = socket.gethostname()
    # All ranks take part, even if no name is a hub's here: a teacher's folder may differ from
    # machine to machine.
    for host, known in gather_objects((here, known_models() if is_first else {})):
        if host == here and not is_first:
            learn(known)
