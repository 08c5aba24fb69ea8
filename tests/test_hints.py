from __future__ import annotations

import pytest

from scaledistill.config.hints import FOREIGN, argument_hint, foreign
from scaledistill.config.wording import setting_names

OPTIONS = ["--config", "--set", "--validate", "--dry-run", "--fresh", "--world-size"]
RESUME = "rerun the same command: it resumes from the newest checkpoint in run.folder by itself"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], f"unknown option --resume; {RESUME}"),
        (
            ["--resume-from-checkpoint", "runs/x"],
            f"unknown option --resume-from-checkpoint; {RESUME}",
        ),
        (["--output_dir", "out"], "unknown option --output_dir; type --set run.folder=out"),
        (["--lr=3e-4"], "unknown option --lr; type --set train.learning_rate=3e-4, the peak"),
        (
            ["--num-epochs", "3"],
            "unknown option --num-epochs; type --set train.max_steps=…, which counts optimizer",
        ),
        (
            ["--lr_scheduler_type", "cosine"],
            'type --set train.schedule=…: "linear", "cosine" or "warmup_stable_decay", which keeps',
        ),
        (["--num-decay-steps", "9"], "type --set train.decay_steps=9"),
        (["--max_steps", "100"], "unknown option --max_steps; type --set train.max_steps=100"),
        (["--train.max_steps=7"], "unknown option --train.max_steps; type --set train.max_steps=7"),
        (["--max_step", "7"], "unknown option --max_step; type --set train.max_steps=7"),
        (["--weight_decay"], "unknown option --weight_decay; type --set train.weight_decay=…"),
        (["--every_steps=5"], "type --set checkpoint.every_steps=5 or --set logging.every_steps=5"),
        (
            ["--per_gpu_train_batch_size", "8"],
            "type --set train.micro_batch_size=…, the sequences per forward of a rank",
        ),
        (
            ["--report_to", "wandb"],
            "unknown option --report_to; type --set logging.trackers=…, a list",
        ),
        (["--bf16"], 'unknown option --bf16; type --set train.precision="bf16"'),
        (
            ["--deepspeed", "ds.json"],
            "unknown option --deepspeed; set the block engine.deepspeed in the configuration",
        ),
        (
            ["--nproc-per-node", "8"],
            "unknown option --nproc-per-node; type --num-ranks N for the ranks of this machine",
        ),
        (
            ["--overwrite_output_dir"],
            "use --fresh to start over; the old run folder is renamed, not deleted",
        ),
        (["--wrld-size"], "unknown option --wrld-size; did you mean --world-size?"),
        (
            ["--xyzzy"],
            "unknown option --xyzzy; settings are given as --set KEY=VALUE, --help lists the "
            "options",
        ),
        (["--wandb"], "unknown option --wandb; type --set 'logging.trackers=[\"wandb\"]'"),
        (["my.json"], "unexpected argument 'my.json'; type --config my.json"),
        (
            ["train.max_steps=3"],
            "unexpected argument 'train.max_steps=3'; type --set train.max_steps=3",
        ),
        (
            ["--do_eval"],
            "unknown option --do_eval; set train.validation_every_steps, or the block evaluation",
        ),
        (["100"], "unexpected argument '100'; settings are given as --set KEY=VALUE"),
    ],
)
def test_what_to_type_instead(arguments: list[str], message: str) -> None:
    text = argument_hint(arguments, OPTIONS, setting_names())
    assert message in text
    assert "\n" not in text


def test_no_advice_hides_a_setting_of_that_name() -> None:
    names = {
        name.rpartition(".")[2] for name in setting_names() if not name.startswith("evaluation.")
    }
    assert names & set(FOREIGN) == {"deepspeed", "model"}
    assert foreign("--Batch-Size") == FOREIGN["batch_size"]
    assert foreign("frobnicate") is None


def test_every_setting_named_in_advice_exists() -> None:
    import re

    names = set(setting_names())
    blocks = {name.rpartition(".")[0] for name in names}
    for advice in (advice.as_key("<name>") for advice in FOREIGN.values()):
        for name in re.findall(
            r"\b(?:run|teacher|relations|data|train|engine|checkpoint|logging)\.[a-z_.]+\w", advice
        ):
            assert name in names | blocks or name.startswith("engine.deepspeed."), advice
