"""Compare the forms of a student: speed, difference from PyTorch, and the STS-B probe.

Inputs: functions from token ids to hidden states and sentence vectors, one for each form. Outputs:
a `Report`. Not handled here: making the forms (`publishing.formats`, `publishing.onnx_model`).

Legend: B sequences, T tokens, D width.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from scaledistill.data.tokenizer import pad_on_the_right
from scaledistill.errors import SourceError, named
from scaledistill.glue.metrics import check_installed
from scaledistill.glue.probe import SimilarityProbe
from scaledistill.glue.read import read_split
from scaledistill.glue.tasks import TASKS
from scaledistill.metrics.benchmark import Report, in_turn

Form = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Ids and mask, [B, T], to hidden states, [B, T, D], and their means, [B, D]."""
Batch = tuple[Tensor, Tensor]
NUM_SENTENCES, CHECK_BATCH = 200, 8
BATCHES, TOKENS, MOST_TOKENS = (1, 32), 128, 512
ROUNDS, ROUND_SECONDS, MAX_SECONDS = 5, 0.2, 15.0
TOLERANCE = 1e-4
"""The largest allowed difference of an unquantised form from PyTorch, relative to the largest
output if that is more than 1."""


@dataclass(frozen=True)
class Difference:
    """How the outputs of a form differ from those of PyTorch, over the real tokens."""

    largest: float
    """Of all components of hidden states and means."""
    mean: float
    """Of the components of the means, absolute."""
    cosine: float
    """The smallest cosine of two means of the same sentence."""
    scale: float
    """The largest component of the reference, absolute."""

    @property
    def allowed(self) -> float:
        """The largest difference of a form that computes the same."""
        return TOLERANCE * max(1.0, self.scale)


def sample_batches(
    tokenizer: PreTrainedTokenizerFast,
    num_tokens: int,
    vocab_size: int,
    *,
    sample: Path | None = None,
    data_folder: Path | None = None,
) -> list[Batch]:
    """Return batches of mixed lengths: lines of a file, STS-B's sentences, or random tokens.

    Args:
        num_tokens: longer inputs are truncated.
        sample: a text file with a sentence per line; spread evenly over it, 200 are used.
        data_folder: GLUE files; used if there is no `sample`.

    Raises:
        SourceError: `sample` cannot be read or has no text.
        DataError: `data_folder` has no STS-B, or damaged files.
    """
    texts: list[str] = []
    if sample is not None:
        try:
            lines = sample.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(
                "sample", str(sample), f"cannot be read ({error})", "name a UTF-8 text file"
            ) from None
        texts = _spread([line for line in lines if line.strip()])
        if not texts:
            raise SourceError("sample", str(sample), "has no text", "give a sentence per line")
    elif data_folder is not None:
        with named(data_folder="data_folder"):
            pairs = read_split(TASKS["stsb"], "dev", data_folder)
        texts = _spread(sorted({text for pair in pairs.texts for text in pair}))
    if not texts:
        return _random_batches(num_tokens, vocab_size)
    pad_on_the_right(tokenizer)
    batches = []
    for first in range(0, len(texts), CHECK_BATCH):
        inputs = tokenizer(
            texts[first : first + CHECK_BATCH],
            truncation=True,
            max_length=num_tokens,
            padding=True,
            return_tensors="pt",
        )
        batches.append((inputs["input_ids"], inputs["attention_mask"]))
    return batches


def compare(
    forms: Mapping[str, Form], reference: Form, batches: Sequence[Batch]
) -> dict[str, Difference]:
    """Return by name how the forms differ from the reference, on the same batches.

    If an output is not finite, neither is the difference.
    """
    largest: dict[str, list[Tensor]] = {name: [] for name in forms}
    cosines: dict[str, list[Tensor]] = {name: [] for name in forms}
    sums, count, scale = dict.fromkeys(forms, 0.0), 0, 0.0
    for ids_BT, mask_BT in batches:
        true_hidden, true_mean = reference(ids_BT, mask_BT)
        real = mask_BT.bool()
        scale = max(scale, float(true_hidden[real].abs().max()))
        count += true_mean.numel()
        for name, form in forms.items():
            hidden, mean = form(ids_BT, mask_BT)
            apart = (mean - true_mean).abs()
            tokens = (hidden - true_hidden).abs()[real]
            largest[name] += [tokens.max(), apart.max()]
            sums[name] += float(apart.sum())
            cosines[name].append(torch.cosine_similarity(mean, true_mean).min())

    def difference(name: str) -> Difference:
        # Python's max and min would drop NaN.
        most, least = torch.stack(largest[name]).max(), torch.stack(cosines[name]).min()
        return Difference(float(most), sums[name] / count, float(least), scale)

    return {name: difference(name) for name in forms}


def probe_scores(
    forms: Mapping[str, Form],
    tokenizer: PreTrainedTokenizerFast,
    data_folder: Path,
    num_tokens: int,
) -> dict[str, float]:
    """Return the STS-B correlation of each form's sentence vectors, from -1 to 1.

    Raises:
        DataError: scipy is missing, or the folder has no STS-B.
    """
    check_installed()
    probe = SimilarityProbe(tokenizer, data_folder, num_tokens)
    scores: dict[str, float] = {}
    for name, form in forms.items():
        scores |= probe.rank(lambda ids, mask, name=name, form=form: {name: form(ids, mask)[1]})  # type: ignore[misc]
    return scores


def measure_speed(
    forms: Mapping[str, Form], vocab_size: int, num_tokens: int, report: Report
) -> dict[str, list[str]]:
    """Time the forms in turn; return per form the texts for batches 1 and 32, and add the figures.

    The texts are milliseconds, sequences per second and the ratio to the first form.
    """
    length = min(TOKENS, num_tokens)
    texts: dict[str, list[str]] = {name: [] for name in forms}
    for batch in BATCHES:
        ids_BT = torch.randint(
            0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(0)
        )
        mask_BT = torch.ones_like(ids_BT)
        runs = {name: _timed(form, ids_BT, mask_BT) for name, form in forms.items()}
        for form in forms.values():  # warm-up
            form(ids_BT, mask_BT)
        seconds = in_turn(runs, rounds=ROUNDS, max_seconds=MAX_SECONDS, title=f"batch {batch}")
        for name, own in report.add_speeds(seconds, batch).items():
            texts[name] += own
    return texts


def _timed(form: Form, ids_BT: Tensor, mask_BT: Tensor) -> Callable[[], float]:
    """Return a function that runs a form and returns the seconds; a quick one is repeated."""

    def run() -> float:
        seconds: list[float] = []
        while not seconds or sum(seconds) < ROUND_SECONDS:
            start = time.perf_counter()
            form(ids_BT, mask_BT)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    return run


def _spread(texts: Sequence[str]) -> list[str]:
    """Return up to 200 texts, evenly spread."""
    count = min(NUM_SENTENCES, len(texts))
    return [texts[i * len(texts) // count] for i in range(count)]


def _random_batches(num_tokens: int, vocab_size: int) -> list[Batch]:
    # ONNX holds all attention weights, which grow with the square of the length.
    num_tokens = min(num_tokens, MOST_TOKENS)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for longest in {1, 2, min(17, num_tokens), num_tokens // 2 or 1, num_tokens}:
        lengths = torch.randint(1, longest + 1, (4, 1), generator=generator)
        lengths[0] = longest
        ids_BT = torch.randint(0, vocab_size, (4, longest), generator=generator)
        batches.append((ids_BT, (torch.arange(longest) < lengths).long()))
    return batches
