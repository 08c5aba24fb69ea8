from __future__ import annotations

import copy
from typing import Any

import pytest
from test_config import BASE, changed

from scaledistill.config.load import parse_config
from scaledistill.config.wording import setting_names
from scaledistill.errors import ConfigError


def message_of(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "train.learning_rate",
            "3e-4",
            "(str); expected a number above 0; write 0.0003 without quotes",
        ),
        (
            "train.learning_rate",
            [0.1],
            "found [0.1] (list, 1 entry); expected a number above 0; write 0.1",
        ),
        (
            "train.learning_rate",
            float("inf"),
            "found Infinity (float); expected a finite number above 0",
        ),
        (
            "train.adam_betas",
            [0.9],
            "found [0.9] (list, 1 entry); expected a list of 2 values, each a number from 0 up",
        ),
        (
            "train.adam_betas",
            [0.9, 1.5],
            "train.adam_betas.1: found 1.5 (float); expected a number from 0 up and below",
        ),
        (
            "train.max_steps",
            500.0,
            "found 500.0 (float); expected a whole number above 0; write 500",
        ),
        (
            "train.max_steps",
            "2_000",
            'found "2_000" (str); expected a whole number above 0; write 2000 without quotes',
        ),
        ("train.max_steps", True, "found true (bool); expected a whole number above 0"),
        ("train.max_steps", None, "train.max_steps: found null; expected a whole number above 0"),
        ("train.micro_batch_size", -1, 'found -1 (int); expected a whole number above 0 or "auto"'),
        ("run.deterministic", "yes", "expected true or false; write true without quotes"),
        ("run.deterministic", 0, "found 0 (int); expected true or false; the default is false"),
        ("teacher.model", 7, 'found 7 (int); expected non-empty text in double quotes; write "7"'),
        (
            "teacher.dtype",
            "bfloat16",
            'expected "auto", "fp32", "bf16" or "fp16"; did you mean "bf16"?',
        ),
        ("teacher.placement", "sharded", '; did you mean "shard"?'),
        ("logging.trackers", "wandb", 'write ["wandb"]'),
        ("train.learning_rate", "0,5", "expected a number above 0; write 0.5 without quotes"),
        ("train.max_steps", "10,000", "write 10000 without quotes"),
        (
            "evaluation",
            {"tasks": []},
            "evaluation.tasks: found [] (list, 0 entries); expected a list of at least one",
        ),
        (
            "students.l3.layer_map",
            [1, "2"],
            'layer_map.1: found "2" (str); expected a whole number above 0; write 2',
        ),
        (
            "students.l3",
            5,
            'students.l3: found 5 (int); expected an object, such as {"key": value}',
        ),
        (
            "relations.pairs",
            {"qq": "1"},
            'relations.pairs.qq: found "1" (str); expected a number from 0 up; write 1',
        ),
    ],
)
def test_a_wrong_value_has_one_line(path: str, value: Any, message: str) -> None:
    text = message_of(changed(path, value))
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "wrong",
    [{"x": object()}, [[]], 1.5, -3, "", True, None],
    ids=lambda value: type(value).__name__,
)
def test_no_setting_shows_a_librarys_words(wrong: Any) -> None:
    """Every setting with every kind of wrong value: one line each, that begins with the setting."""
    for name in setting_names(["l3"]):
        if name.startswith("evaluation."):
            tree = changed("evaluation.tasks", ["rte"])
        else:
            tree = copy.deepcopy(BASE)
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = wrong
        try:
            parse_config(tree)
        except ConfigError as error:
            text = str(error)
        else:
            continue  # a good value for this one
        assert len(text.splitlines()) == 1, text
        assert text.startswith(parents[0]), text
        for word in ("Input should", "valid integer", "another value", "constrained"):
            assert word not in text


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("train.warmup", "train.warmup: unknown key; set train.warmup_steps, a number of steps"),
        ("hidden_size", "hidden_size: unknown key; did you mean 'students.l3.hidden_size'?"),
        ("max_steps", "max_steps: unknown key; did you mean 'train.max_steps'?"),
        ("train.seed", "train.seed: unknown key; did you mean 'run.seed'?"),
        ("train.relation_head", "did you mean 'students.l3.relation_heads'?"),
        ("run.every_steps", "did you mean 'checkpoint.every_steps' or 'logging.every_steps'?"),
        (
            "train.batch_size",
            "train.batch_size: unknown key; set train.global_batch_size, the sequences of",
        ),
        (
            "train.gradient_accumulation_steps",
            "it follows from train.global_batch_size, train.micro_batch_size and",
        ),
        (
            "train.num_train_epochs",
            "unknown key; set train.max_steps, which counts optimizer steps: epochs × training",
        ),
        ("output_dir", "output_dir: unknown key; set run.folder"),
        ("students.l3.num_hidden_layers", "unknown key; set students.l3.num_layers"),
        ("data.validate", "data.validate: unknown key; did you mean 'validation'?"),
        (
            "checkpoint.xyzzy",
            "unknown key; known keys: every_steps, keep, remote, max_failed_saves",
        ),
    ],
)
def test_an_unknown_key_is_looked_for_everywhere(path: str, message: str) -> None:
    assert message in message_of(changed(path, 1))


def test_the_settings_of_an_evaluation_alone() -> None:
    from scaledistill.glue.api import evaluate

    with pytest.raises(ConfigError) as caught:
        evaluate("m", ["rte"], learning_rate=["1e-4"], epochs=[3, 0])  # type: ignore[list-item]
    assert str(caught.value).splitlines() == [
        'learning_rate.0: found "1e-4" (str); expected a number above 0; write 0.0001 without '
        "quotes",
        "epochs.1: found 0 (int); expected a whole number above 0",
    ]
