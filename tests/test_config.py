from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from scaledistill.config import FREE_ON_RESUME, DistillConfig, differing_keys
from scaledistill.configfile import load_config, parse_config
from scaledistill.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"
BASE: dict[str, Any] = {
    "run": {"folder": "runs/x"},
    "teacher": {"model": "m", "layer": 3},
    "students": {"l3": {"num_layers": 3, "hidden_size": 192, "num_attention_heads": 6}},
    "relations": {"num_heads": 12},
    "data": {"train": "t", "sequence_length": 128},
    "train": {"global_batch_size": 8, "max_steps": 10, "learning_rate": 1e-3},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(BASE)
    *parents, last = path.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.globl_batch_size", 8, r"^train\.globl_batch_size: unknown key; did you mean 'global_batch_size'\?$"),
        ("students.l3.hiden_size", 8, r"^students\.l3\.hiden_size: unknown key; did you mean 'hidden_size'\?$"),
        ("traim", {}, r"^traim: unknown key; did you mean 'train'\?$"),
        ("engine.xyzzy", 1, r"^engine\.xyzzy: unknown key; known keys: name, deepspeed, fsdp$"),
        ("train.max_steps", "ten", r'^train\.max_steps: found "ten" \(str\); should be a valid integer'),
        ("train.max_steps", 1.5, r"^train\.max_steps: found 1\.5 \(float\)"),
        ("train.max_steps", True, r"^train\.max_steps: found true \(bool\)"),
        ("train.max_steps", 0, r"^train\.max_steps: found 0 \(int\); should be greater than 0"),
        (
            "train.micro_batch_size",
            "all",
            r"^train\.micro_batch_size: found \"all\" \(str\); should be a valid integer or 'auto'$",
        ),
        ("train.compile", 1, r"^train\.compile: found 1 \(int\); should be a valid boolean or 'auto'$"),
        ("train.bool", 1, r"^train\.bool: unknown key"),
        ("train.warmup_steps", 11, r"warmup_steps=11 is more than max_steps=10"),
        ("train.validation_every_steps", 5, r"needs data\.validation, which is not set"),
        ("train.adam_betas", [0.9], r"^train\.adam_betas: found \[0\.9\]"),
        ("run", {}, r"^run\.folder: missing, a value is required$"),
        ("relations.pairs", {"qx": 1.0}, r"unknown pair 'qx', expected some of qq, qk"),
        ("relations.pairs", {"qq": 0.0}, r"no pair has a weight above 0"),
        ("students", {}, r"students has 0 entries"),
        ("students", {"a b": BASE["students"]["l3"]}, r"students\.a b: a name has letters"),
        ("students.l3.layer_map", [1, 2, 3], r"layer_map is read only with init='teacher'"),
        ("engine.fsdp", {"ofload": True}, r"engine\.fsdp\.ofload: unknown key; did you mean 'cpu_offload'"),
    ],
)
def test_bad_setting_is_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(changed(path, value))


def test_layer_map_has_one_entry_per_layer() -> None:
    tree = changed("students.l3.layer_map", [1, 2])
    tree["students"]["l3"]["init"] = "teacher"
    with pytest.raises(ConfigError, match="layer_map names 2 teacher layers, expected num_layers=3"):
        parse_config(tree)


def test_every_problem_is_reported() -> None:
    tree = changed("train.max_stepz", 3)
    tree["data"]["sequence_length"] = "long"
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    assert "train.max_stepz" in str(caught.value)
    assert "data.sequence_length" in str(caught.value)


def test_models_are_frozen() -> None:
    config = parse_config(BASE)
    with pytest.raises(ValueError, match="frozen"):
        config.train.max_steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path: Path) -> None:
    config = load_config(path)
    assert load_round_trip(config) == config
    assert config.run.folder == f"runs/{path.stem}"


def load_round_trip(config: DistillConfig) -> DistillConfig:
    return parse_config(json.loads(config.to_json()))


def test_published_settings_of_large_to_l6() -> None:
    config = load_config(CONFIGS / "large_to_l6.json")
    train = config.train
    assert (config.teacher.layer, config.relations.num_heads, config.data.sequence_length) == (21, 64, 512)
    assert (train.global_batch_size, train.max_steps, train.learning_rate, train.warmup_steps) == (
        256,
        400_000,
        6e-4,
        4000,
    )
    assert (train.weight_decay, train.adam_epsilon, train.adam_betas) == (0.01, 1e-6, [0.9, 0.999])


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(BASE))
    config = load_config(
        path, ["train.max_steps=20", "teacher.model=org/name", "run.deterministic=true", "train.max_steps=30"]
    )
    assert (config.train.max_steps, config.teacher.model, config.run.deterministic) == (30, "org/name", True)
    with pytest.raises(ConfigError, match=r"--set train\.max_steps: expected KEY=VALUE"):
        load_config(path, ["train.max_steps"])
    with pytest.raises(ConfigError, match="'max_steps' is a value, not a block"):
        load_config(path, ["train.max_steps.x=1"])
    with pytest.raises(ConfigError, match=r"trian: unknown key; did you mean 'train'\?"):
        load_config(path, ["trian.max_steps=1"])


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "quickstart.json").write_text("{")
    with pytest.raises(ConfigError, match=r"quikstart\.json: no such file; did you mean .*quickstart\.json\?"):
        load_config(tmp_path / "quikstart.json")
    with pytest.raises(ConfigError, match=r"not valid JSON: .* line 1"):
        load_config(tmp_path / "quickstart.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="found a JSON list, expected an object"):
        load_config(tmp_path / "list.json")
    (tmp_path / "twice.json").write_text('{"run": {}, "run": {}}')
    with pytest.raises(ConfigError, match="the key 'run' stands twice"):
        load_config(tmp_path / "twice.json")


def test_differing_keys_ignores_what_does_not_change_the_result() -> None:
    old = parse_config(BASE).model_dump()
    for path, value in [
        ("checkpoint.keep", 9),
        ("engine.deepspeed", {"zero_optimization": {"stage": 3}}),
        ("run.folder", "y"),
    ]:
        assert differing_keys(old, parse_config(changed(path, value)).model_dump()) == []
    new = parse_config(changed("train.learning_rate", 2e-3)).model_dump()
    assert differing_keys(old, new) == ["train.learning_rate: 0.001 -> 0.002"]
    assert differing_keys(old, parse_config(changed("relations.pairs", {"vv": 1.0})).model_dump()) == [
        "relations.pairs.kk: 1.0 -> null",
        "relations.pairs.qq: 1.0 -> null",
    ]


def test_free_keys_exist() -> None:
    tree = parse_config(BASE).model_dump()
    for path in FREE_ON_RESUME:
        node: Any = tree
        for part in path.split("."):
            node = node[part]
