"""Measure a run's relation maps: at its end, or later from its newest checkpoint.

Inputs: a session, or a configuration whose teacher and data are still there. Outputs: `maps.json`
in the run's folder. Not handled here: the maps themselves (`report.maps`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from scaledistill.config.naming import teacher_names
from scaledistill.config.schema import DistillConfig
from scaledistill.data.stream import Batch, iter_validation
from scaledistill.data.tokenizer import load_tokenizer
from scaledistill.data.tokens import TokenInputs
from scaledistill.distributed.ranks import failing_together
from scaledistill.errors import ConfigError, DataError, named
from scaledistill.models.architectures import build_encoder
from scaledistill.models.hub import names_resolved_once
from scaledistill.models.loss import causal_relations
from scaledistill.models.teacher import Teacher, load_config, load_encoder
from scaledistill.models.view import capture_view
from scaledistill.preflight.checks import open_data, student_shape
from scaledistill.preflight.roster import student_states
from scaledistill.relations import QKV
from scaledistill.report.maps import (
    KL_ROWS,
    NUM_SENTENCES,
    SENTENCE_TOKENS,
    StudentMaps,
    kl_per_head,
    student_maps,
    write_maps,
)
from scaledistill.storage.files import disk_remedy
from scaledistill.storage.remote import without_credentials
from scaledistill.training.exports import checkpoint_of_run
from scaledistill.training.session import Session

log = logging.getLogger(__name__)

Forward = Callable[[TokenInputs], QKV]
TEACHER = ""
"""The teacher's name among the models; no student has it."""


@torch.no_grad()
def write_session_maps(session: Session) -> None:
    """Write the maps of all students under training, on rows of rank 0. Collective.

    The rows are the first of `data.validation` if the run validates, else the first of the run.
    """
    if session.held_out:
        batch = next(session.validation_batches())
    else:
        with session.stream(0) as stream:
            batch = next(stream)
    for student in session.students:
        student.engine.train_mode(False)
    # A shape that no block was compiled for: once, so not worth compiling.
    with torch.compiler.set_stance("eager_on_recompile"):
        students = {student.name: student.engine.forward for student in session.students}
        outputs = _forwards({TEACHER: session.teacher, **students}, batch)
    for student in session.students:
        student.engine.train_mode(True)
    with failing_together():
        if session.ranks.is_main:
            named_rows = session.config.data.validation if session.held_out else "the run"
            causal = causal_relations(session.teacher.config, session.students[0].config)
            try:
                measured = _measure(session.config, outputs, batch, causal=causal)
                _write(session.config, session.step, batch, measured, str(named_rows))
            # The run is done, and its students are exported.
            except (OSError, DataError, MemoryError, torch.OutOfMemoryError) as error:
                log.warning("the relation maps are not written: %s", error)


@names_resolved_once()
@torch.no_grad()
def write_checkpoint_maps(config: DistillConfig) -> None:
    """Write the maps of a run's newest checkpoint; loads the teacher and reads some rows.

    Raises:
        ConfigError, DataError: the run has no checkpoint, or its teacher or data are not there.
    """
    checkpoint = checkpoint_of_run(config, "newest", "--maps")
    sources, _, held_out = open_data(config)
    shards = held_out or sources[0].shards
    settings = config.teacher
    with named(**teacher_names(settings)):
        encoder = load_encoder(
            settings.model,
            revision=settings.revision,
            num_layers=settings.layer,
            trust_remote_code=settings.trust_remote_code,
        )
        whole = load_config(settings.model, settings.revision, settings.trust_remote_code)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    students: dict[str, Forward] = {}
    causal = False
    # A resumed run may have removed some, and not saved since.
    trained = student_states(checkpoint.state)
    for name in (name for name in config.students if name in trained):
        model = build_encoder(student_shape(config, name, whole, checkpoint.state))
        model.load_state_dict(checkpoint.tensors(f"{name}.weights"))
        view = capture_view(model, model.config.num_hidden_layers)
        view.module.to(device).eval()
        students[name] = view
        causal = causal_relations(encoder.config, model.config)
    if not students:
        raise ConfigError(
            f"{checkpoint.folder} has none of the students {', '.join(config.students)}"
        )
    teacher = Teacher(encoder, settings.layer, dtype=torch.float32).to(device)
    rows = iter_validation(
        shards,
        rows=KL_ROWS,
        micro_batch_size=KL_ROWS,
        with_documents=config.data.attention == "document",
    )
    batch = next(rows).with_tensors(lambda tensor: tensor.to(device))
    outputs = _forwards({TEACHER: teacher, **students}, batch)
    measured = _measure(config, outputs, batch, causal=causal)
    try:
        _write(config, checkpoint.state["step"], batch, measured, str(shards.location))
    except OSError as error:
        raise DataError(
            f"run.folder={config.run.folder!r} cannot be written: {error}; {disk_remedy(error)}"
        ) from None


def _forwards(models: Mapping[str, Forward], batch: Batch) -> dict[str, tuple[QKV, QKV]]:
    """Return each model's output for the rows, and for the sentences cut from them. Collective."""
    sentences = _cut(batch)
    return {name: (forward(batch.tokens), forward(sentences)) for name, forward in models.items()}


def _measure(
    config: DistillConfig,
    outputs: Mapping[str, tuple[QKV, QKV]],
    batch: Batch,
    *,
    causal: bool,
) -> dict[str, StudentMaps]:
    """Return the maps of each student, from the outputs of `_forwards`."""
    sentences, pairs = _cut(batch), config.relations.pairs
    lengths = _lengths(sentences)
    target, target_cut = outputs[TEACHER]
    measured = {}
    for name, (own, own_cut) in outputs.items():
        if name == TEACHER:
            continue
        kl = kl_per_head(
            target, own, batch.tokens, config.relation_heads(name), pairs, causal=causal
        )
        rows = min(KL_ROWS, batch.input_ids_BT.shape[0])
        measured[name] = student_maps(kl, target_cut, own_cut, lengths, pairs, rows, causal=causal)
    return measured


def _cut(batch: Batch) -> TokenInputs:
    """Return the beginnings of the first rows, each as one sentence that stands alone."""
    tokens = batch.tokens
    ids_BT = tokens.input_ids_BT[:NUM_SENTENCES, :SENTENCE_TOKENS]
    mask_BT = None if tokens.mask_BT is None else tokens.mask_BT[:NUM_SENTENCES, :SENTENCE_TOKENS]
    return TokenInputs(ids_BT.contiguous(), mask_BT)


def _lengths(sentences: TokenInputs) -> list[int]:
    if sentences.mask_BT is None:
        B, T = sentences.input_ids_BT.shape
        return [T] * B
    # Padding comes last; a filler row of padding alone still has its first token shown.
    return sentences.mask_BT.sum(1).clamp(min=1).tolist()


def _write(
    config: DistillConfig,
    step: int,
    batch: Batch,
    measured: dict[str, StudentMaps],
    location: str,
) -> None:
    sentences = _cut(batch)
    tokenizer = load_tokenizer(config.teacher.model, config.teacher.revision)
    texts = [
        [str(tokenizer.decode([number])) for number in ids[:length]]
        for ids, length in zip(sentences.input_ids_BT.tolist(), _lengths(sentences), strict=True)
    ]
    source = f"the first rows of {without_credentials(location)}"
    write_maps(Path(config.run.folder), step, source, texts, measured)
