"""Record bertdistiller's losses for tests/test_trainer.py: run in its environment, `python
record.py FOLDER`.

Leaves a tiny teacher and student, batches of unequal lengths and, of each of 20 steps, the loss:
fp32, no dropout.
"""

from __future__ import annotations

import json
import random
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

STEPS, BATCH, LENGTH, VOCABULARY = 20, 6, 24, 60
ARGUMENTS = {
    "teacher_layer": 3,
    "student_layer": 2,
    "student_hidden_size": 12,
    "student_attention_heads": 2,
    "num_relation_heads": 6,
    "per_device_train_batch_size": BATCH,
    "learning_rate": 2e-3,
    "weight_decay": 0.01,
    "warmup_steps": 4,
    "max_steps": STEPS,
    "lr_scheduler_type": "linear",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 3,
}
RELATIONS = {(1, 1): 1.0, (2, 2): 0.5, (1, 3): 2.0}


def examples() -> list[dict[str, list[int]]]:
    """Return rows of 3 to 24 tokens."""
    generator = random.Random(7)
    lengths = [generator.randint(3, LENGTH) for _ in range(STEPS * BATCH)]
    return [
        {
            "input_ids": [generator.randrange(5, VOCABULARY) for _ in range(n)],
            "attention_mask": [1] * n,
        }
        for n in lengths
    ]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Pad on the right: bertdistiller takes that for granted."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    return {
        name: torch.tensor([row[name] + [0] * (longest - len(row[name])) for row in rows])
        for name in ("input_ids", "attention_mask")
    }


def losses_of(trainer_class: type, arguments: Any, teacher: Any, student: Any) -> list[float]:
    """Train on the examples in their order; return the loss of each step."""
    from torch.utils.data import SequentialSampler

    losses: list[float] = []

    class Trainer(trainer_class):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(examples())

    Trainer(
        model=student,
        teacher_model=teacher,
        args=arguments,
        train_dataset=examples(),
        data_collator=collate,
    ).train()
    return losses


def record(folder: Path) -> None:
    import torch
    from bertdistiller import MiniLMTrainer, MiniLMTrainingArguments
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "initializer_range": 0.3}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(5)
    shapes = {"teacher": (24, 4, 4, 32), "student": (12, 2, 2, 24)}
    for name, (width, layers, heads, inner) in shapes.items():
        shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        BertModel(BertConfig(**sizes, **shape, intermediate_size=inner)).save_pretrained(
            folder / name
        )
    teacher, student = (BertModel.from_pretrained(folder / name) for name in shapes)
    # The one name that it takes, for the same encoder.
    teacher.config.architectures = ["BertForMaskedLM"]
    arguments = MiniLMTrainingArguments(
        **ARGUMENTS, relations=RELATIONS, output_dir=str(folder / "output")
    )
    losses = losses_of(MiniLMTrainer, arguments, teacher, student)
    versions = {name: version(name) for name in ("bertdistiller", "torch", "transformers")}
    (folder / "losses.json").write_text(
        json.dumps({"versions": versions, "losses": losses}, indent=1) + "\n"
    )


if __name__ == "__main__":
    record(Path(sys.argv[1]))
