"""Distil bertdistiller's student for tools/quality, with its own code in its own environment.

`load_dataset("text")` reads the text, one line (a paragraph) per example, and bertdistiller's
`prepare_dataset` truncates it. Its `create_student` takes the teacher's weights, and its trainer
uses our batch size, learning rate and schedule, for as many steps as the given number of real
tokens needs. It resumes from the Trainer's own checkpoints.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bertdistiller import MiniLMTrainer, MiniLMTrainingArguments, create_student, prepare_dataset
from datasets import load_dataset
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, set_seed
from transformers.trainer_utils import get_last_checkpoint


def main(spec: dict[str, Any]) -> None:
    """Distil according to `spec`, and write the model and `facts.json` into its `output`."""
    if (Path(spec["output"]) / "facts.json").is_file():
        return
    set_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(spec["teacher"])
    text = load_dataset("text", data_files=spec["text"], split="train").filter(
        lambda row: bool(row["text"].strip())
    )
    rows = prepare_dataset([text], tokenizer, max_seq_len=spec["sequence_length"])
    lengths = torch.tensor([len(ids) for ids in rows.with_format(None)["input_ids"]])
    steps = -(-spec["tokens"] // int(lengths.double().mean() * spec["batch_size"]))
    arguments = MiniLMTrainingArguments(
        teacher_layer=spec["teacher_layer"],
        student_layer=spec["student"]["num_layers"],
        student_hidden_size=spec["student"]["hidden_size"],
        student_attention_heads=spec["student"]["num_attention_heads"],
        num_relation_heads=spec["relation_heads"],
        relations={(1, 1): 1.0, (2, 2): 1.0, (3, 3): 1.0},
        output_dir=spec["scratch"],
        per_device_train_batch_size=spec["batch_size"],
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="linear",
        warmup_steps=int(spec["warmup_fraction"] * steps),
        weight_decay=0.01,
        adam_epsilon=1e-6,
        max_steps=steps,
        logging_steps=20,
        save_steps=25,
        save_total_limit=1,
        report_to="none",
        seed=1,
    )
    teacher = AutoModel.from_pretrained(spec["teacher"])
    # bertdistiller accepts only this name; the encoder is the same.
    teacher.config.architectures = ["BertForMaskedLM"]
    student = create_student(spec["teacher"], arguments, use_teacher_weights=True)
    trainer = MiniLMTrainer(
        args=arguments,
        teacher_model=teacher,
        model=student,
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    start = time.time()
    last = get_last_checkpoint(spec["scratch"]) if Path(spec["scratch"]).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    student.save_pretrained(spec["output"])
    tokenizer.save_pretrained(spec["output"])
    facts = {
        "steps": steps,
        "rows": len(rows),
        "mean_tokens_per_row": lengths.double().mean().item(),
        "tokens": int(steps * spec["batch_size"] * lengths.double().mean()),
        "seconds_of_the_last_start": time.time() - start,
        "losses": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    (Path(spec["output"]) / "facts.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
