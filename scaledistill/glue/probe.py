"""Score a model without fine-tuning: how well its sentence vectors rank STS-B's dev pairs.

Inputs: an encoder, its tokenizer, the pairs. Outputs: Spearman's correlation of the labels with the
cosine of the mean hidden states. A student with tap "last" never trains what follows its last
block's query, key and value, so the output of the block below is scored as well.

Legend: B sentences of a batch, T tokens, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from scaledistill.data.tokenizer import load_tokenizer, pad_on_the_right
from scaledistill.errors import Field, Problems, named
from scaledistill.glue.metrics import check_installed
from scaledistill.glue.plan import plan_model
from scaledistill.glue.read import read_split
from scaledistill.glue.tasks import TASKS
from scaledistill.metrics.benchmark import Report
from scaledistill.models.teacher import load_encoder

BATCH = 64
MAX_LENGTH = 128
METRICS = {"stsb_spearman": -1, "stsb_spearman_below": -2}
"""By metric, the index of the block, counted from the end, whose output is pooled."""


def probe_models(models: Mapping[str, str], data_folder: Path | None) -> Report:
    """Score models without fine-tuning; return the table and the figures.

    Args:
        models: folder or hub name of each model by its name in the table.
        data_folder: as for `read_split`.

    Raises:
        ConfigError, DataError: models or data cannot be used; one line for every problem.
    """
    problems = Problems()
    problems.attempt(check_installed)
    found = [problems.attempt(plan_model, name, path, []) for name, path in models.items()]
    problems.attempt(read_split, TASKS["stsb"], "dev", data_folder)
    problems.raise_all()
    report = Report()
    table = report.table(
        "STS-B dev, Spearman without fine-tuning: cosine of mean-pooled hidden states",
        ["model", "parameters", "pairs", "last block", "block below", "seconds"],
    )
    for model in found:
        assert model is not None
        start = time.perf_counter()
        probe = SimilarityProbe(load_tokenizer(model.folder), data_folder, model.positions)
        with named(model=Field(f"model {model.name}", model.path)):
            encoder = load_encoder(model.folder, dtype=torch.float32)
        nn.Module.to(encoder, "cuda" if torch.cuda.is_available() else "cpu")
        scores = probe.score(encoder)
        for metric, value in scores.items():
            report.add(f"{model.name}/probe/{metric}", value, "Spearman")
            report.figures[-1]["n"] = probe.num_pairs
        cells = [f"{value:.3f}" for value in scores.values()]
        seconds = f"{time.perf_counter() - start:.1f}"
        table.rows.append(
            [model.name, f"{model.parameters / 1e6:.1f} M", str(probe.num_pairs), *cells, seconds]
        )
    return report


class SimilarityProbe:
    """STS-B's dev split, tokenised once, and the scores of encoders on it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        data_folder: Path | None,
        positions: int | None = None,
    ) -> None:
        """Read and tokenise the pairs.

        Args:
            data_folder: as for `read_split`.
            positions: the model's limit, if it has one; sentences are truncated there, and to 128
                tokens.

        Raises:
            DataError: see `read_split`.
        """
        pad_on_the_right(tokenizer)
        self._tokenizer = tokenizer
        pairs = read_split(TASKS["stsb"], "dev", data_folder)
        self._labels = torch.tensor(pairs.labels, dtype=torch.float64)
        # Each sentence once, sorted so that batches have similar lengths.
        sentences = sorted({sentence for pair in pairs.texts for sentence in pair}, key=len)
        place = {sentence: i for i, sentence in enumerate(sentences)}
        self._pairs = torch.tensor([[place[sentence] for sentence in pair] for pair in pairs.texts])
        self._batches = [
            tokenizer(
                sentences[first : first + BATCH],
                truncation=True,
                max_length=min(MAX_LENGTH, positions or MAX_LENGTH),
            )
            for first in range(0, len(sentences), BATCH)
        ]
        self.num_pairs = len(pairs.texts)

    @torch.no_grad()
    def score(self, encoder: PreTrainedModel) -> dict[str, float]:
        """Return the correlations by metric name, from -1 to 1.

        Args:
            encoder: in eval mode, on any device, with the tokenizer's vocabulary.
        """
        device = next(encoder.parameters()).device

        def embed(ids_BT: Tensor, mask_BT: Tensor) -> dict[str, Tensor]:
            mask_BT = mask_BT.to(device)
            layers = encoder(
                input_ids=ids_BT.to(device), attention_mask=mask_BT, output_hidden_states=True
            ).hidden_states
            return {name: _mean(layers[layer], mask_BT) for name, layer in METRICS.items()}

        return self.rank(embed)

    def rank(self, embed: Callable[[Tensor, Tensor], Mapping[str, Tensor]]) -> dict[str, float]:
        """Return the correlation of each kind of sentence vector, from -1 to 1.

        A correlation is NaN if the cosines are all equal, or one of them is not finite.

        Args:
            embed: returns the vectors, [B, D], of ids and mask, [B, T], by name.
        """
        from scipy.stats import spearmanr

        vectors: dict[str, list[Tensor]] = {}
        for batch in self._batches:
            inputs = self._tokenizer.pad(batch, return_tensors="pt")
            for name, part in embed(inputs["input_ids"], inputs["attention_mask"]).items():
                vectors.setdefault(name, []).append(part.double().cpu())
        found: dict[str, float] = {}
        for name, parts in vectors.items():
            left, right = torch.cat(parts)[self._pairs].unbind(1)
            cosines = torch.cosine_similarity(left, right)
            finite = bool(cosines.isfinite().all()) and bool((cosines != cosines[0]).any())
            found[name] = (
                float(spearmanr(self._labels, cosines).statistic) if finite else float("nan")
            )
        return found


def _mean(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the mean over each sentence's real tokens, [B, D]."""
    mask_BT1 = mask_BT.unsqueeze(-1)
    return (hidden_BTD.float() * mask_BT1).sum(1) / mask_BT1.sum(1)
