"""YAML configurations: the traps of YAML 1.1, lines in errors, and writing that reads back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_config import BASE, CONFIGS

from scaledistill.config.load import load_config, parse_config
from scaledistill.config.manual import commented_yaml, explain_setting, find_setting, json_schema
from scaledistill.config.schema import DistillConfig, may_change
from scaledistill.config.wording import setting_names
from scaledistill.config.yaml_text import lines_of, parse_yaml, to_yaml
from scaledistill.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("6E-4", 6e-4),
        ("1.", 1.0),
        ("-.5", -0.5),
        ("12", 12),
        ("010", 10.0),  # as a float; no setting takes it for the octal 8
        ("no", "no"),
        ("off", "off"),
        ("Yes", "Yes"),
        ("true", True),
        ("False", False),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2026-01-31", "2026-01-31"),
        (".inf", ".inf"),
        ("0x10", "0x10"),
        ("~", None),
        ("", None),
        ("null", None),
        ("'1e-4'", "1e-4"),
        ("[1e-4, no]", [1e-4, "no"]),
        ("runs/x # mine", "runs/x"),
    ],
)
def test_values_are_those_of_json(text: str, value: Any) -> None:
    found = parse_yaml(f"a: {text}")["a"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "value",
    [
        *("1e-4", "no", "off", "010", "1:30", "2026-01-31", "~", "", "a: b", "- a", "#", "a, b"),
        *("é", "<<", "a\nb", "[x", "3"),
        *(1e-6, 2e-3, 1e16, 0, -3, True, None, [], {}, [1, [2]], {"x": {"y": [1e-9]}}),
    ],
)
def test_what_is_written_reads_back(value: Any) -> None:
    tree = {"a": {"no": value, "3": 1}}
    text = to_yaml(tree)
    assert parse_yaml(text) == tree
    # Readers of YAML 1.1 see no other text either.
    if isinstance(value, str):
        assert yaml.safe_load(text)["a"]["no"] == value


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_presets_as_yaml_are_the_same_run(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(commented_yaml(json.loads(path.read_text())))
    assert load_config(file) == load_config(path)
    file.write_text(commented_yaml(load_config(path).model_dump()))
    assert load_config(file) == load_config(path)
    text = file.read_text()
    assert "  # Optimizer steps of the run.\n  max_steps: " in text
    assert text.count("# Number of blocks.") == 1
    assert max(map(len, text.splitlines())) <= 100


def test_anchors_and_merges_are_copies(tmp_path: Path) -> None:
    tree = {key: value for key, value in BASE.items() if key != "students"}
    (tmp_path / "x.yaml").write_text(
        to_yaml(tree) + "students:\n"
        "  l3: &l3 {num_layers: 3, hidden_size: 192, num_attention_heads: 6, layer_map: [1, 2, 3],"
        " init: teacher}\n"
        "  l3b: *l3\n"
        "  wide:\n    <<: *l3\n    hidden_size: 384\n"
    )
    config = load_config(tmp_path / "x.yaml", ["students.l3.hidden_size=96"])
    assert [student.hidden_size for student in config.students.values()] == [96, 192, 384]
    assert config.students["wide"].layer_map == [1, 2, 3]


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_errors_state_the_line(suffix: str, tmp_path: Path) -> None:
    """Of the key, or else of its block; the same text after it for JSON and YAML."""
    file = tmp_path / f"x.{suffix}"
    tree = json.loads(json.dumps(BASE))
    tree["run"] = {"seed": "no"}
    tree["train"]["max_stesp"] = 3
    tree["students"]["l3"]["layer_map"] = [1, 2]
    text = json.dumps(tree, indent="\t") if suffix == "json" else to_yaml(tree)
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["teacher.layer=0"])

    def line(word: str) -> int:
        return next(n for n, row in enumerate(text.splitlines(), 1) if f"{word}" in row)

    seed, run, layer_map, steps = map(line, ("seed", "run", "layer_map", "max_stesp"))
    messages = str(caught.value).splitlines()
    assert messages == [
        f"{file}:{run}: run.folder: missing, a value is required",
        f'{file}:{seed}: run.seed: found "no" (str); expected a whole number from 0 up; the '
        "default is 1",
        "teacher.layer: found 0 (int); expected a whole number above 0",  # from --set: no line
        f"{file}:{layer_map}: students.l3: layer_map is read only with init='teacher', found "
        "init='random'; remove one of them",
        f"{file}:{steps}: train.max_stesp: unknown key; did you mean 'max_steps'?",
    ]


def test_lines_of_lists_and_of_what_cannot_be_read() -> None:
    assert lines_of('{"a":\n\t[1,\n 2]}') == {("a",): 1, ("a", "0"): 2, ("a", "1"): 3}
    assert lines_of("{") == {}
    assert lines_of("") == {}


def test_the_schema_key_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"$schema": "s.json", **BASE}))
    assert load_config(tmp_path / "x.json") == parse_config(BASE)
    (tmp_path / "x.json").write_text(json.dumps(BASE | {"run": {"$schema": "s.json"}}))
    with pytest.raises(ConfigError, match=r"x\.json:1: run\.\$schema: unknown key"):
        load_config(tmp_path / "x.json")


def test_the_json_schema_describes_every_setting() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["additionalProperties"] is False
    assert list(schema["properties"]) == ["$schema", *DistillConfig.model_fields]
    assert set(schema["required"]) == set(BASE)
    steps = schema["$defs"]["TrainSettings"]["properties"]["max_steps"]
    assert (steps["type"], steps["exclusiveMinimum"]) == ("integer", 0)
    for block in schema["$defs"].values():
        for name, field in block["properties"].items():
            assert field.get("description"), name


@pytest.mark.parametrize("name", setting_names(["l6"]))
def test_every_setting_is_explained(name: str) -> None:
    found = find_setting(name)
    assert found.key == name
    assert found.description
    title, *rows = explain_setting(name).splitlines()
    assert title == name
    text = "\n".join(rows)
    free = any(name == key or name.startswith(f"{key}.") for key in may_change())
    assert ("a resume with another value is refused" in text) == (
        not free and name not in ("train.max_steps", "train.schedule", "train.decay_steps")
    )


def test_what_explain_prints() -> None:
    assert explain_setting("train.warmup_steps") == (
        "train.warmup_steps\n"
        "  Steps of linear warm-up, at the end of which the learning rate is at its peak.\n\n"
        "  values   a whole number from 0 up\n"
        "  default  0\n"
        "  resume   a resume with another value is refused\n"
    )
    assert "  resume   may change, if all steps" in explain_setting("train.max_steps")
    assert "the content must be the same" in explain_setting("data.train")
    assert explain_setting("engine.deepspeed.zero_optimization.stage").startswith(
        "engine.deepspeed\n"
    )
    for key in ("data.train.weight", "data.train.0.weight"):
        assert "Its share of the samples" in explain_setting(key)
        assert "another value is refused" in explain_setting(key)
    assert "data.train.NUMBER.weight  Its share" in explain_setting("data.train")
    with pytest.raises(ConfigError, match=r"data\.train\.wieght; did you mean 'weight'"):
        explain_setting("data.train.wieght")
    block = explain_setting("students.any")
    assert "  students.any.num_layers           Number of blocks.\n" in block
    assert all(f"  {name} " in explain_setting("") for name in DistillConfig.model_fields)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("train.max_stesp", "unknown setting train.max_stesp; did you mean 'max_steps'?"),
        ("max_steps", "unknown setting max_steps; did you mean 'train.max_steps'?"),
        ("students.l6.hiden_size", "did you mean 'hidden_size'?"),
        ("lr", "unknown setting lr; set train.learning_rate, the peak"),
        ("run.seed.x", "run.seed is one value and has no key 'x'"),
    ],
)
def test_misspelt_settings(key: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        explain_setting(key)
    assert message in str(caught.value)
