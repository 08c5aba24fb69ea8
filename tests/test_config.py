from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from scaledistill.config.load import check_paths, load_config, parse_config
from scaledistill.config.schema import DistillConfig, differing_keys, may_change
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
        (
            "train.globl_batch_size",
            8,
            r"^train\.globl_batch_size: unknown key; did you mean 'global_batch_size'\?$",
        ),
        (
            "students.l3.hiden_size",
            8,
            r"^students\.l3\.hiden_size: unknown key; did you mean 'hidden_size'\?$",
        ),
        ("traim", {}, r"^traim: unknown key; did you mean 'train'\?$"),
        ("engine.xyzzy", 1, r"^engine\.xyzzy: unknown key; known keys: name, deepspeed, fsdp$"),
        (
            "train.max_steps",
            "ten",
            r'^train\.max_steps: found "ten" \(str\); expected a whole number above 0$',
        ),
        ("train.max_steps", 1.5, r"^train\.max_steps: found 1\.5 \(float\)"),
        ("train.max_steps", True, r"^train\.max_steps: found true \(bool\)"),
        (
            "train.max_steps",
            0,
            r"^train\.max_steps: found 0 \(int\); expected a whole number above 0$",
        ),
        (
            "train.micro_batch_size",
            "all",
            r"^train\.micro_batch_size: found \"all\" \(str\); expected a whole number above 0 or "
            r"\"auto\"$",
        ),
        (
            "train.compile",
            1,
            r"^train\.compile: found 1 \(int\); expected true or false or \"auto\"; the default is "
            r"\"auto\"$",
        ),
        ("train.bool", 1, r"^train\.bool: unknown key"),
        ("train.warmup_steps", 11, r"warmup_steps=11 is more than max_steps=10"),
        (
            "train.schedule",
            "cosin",
            r'^train\.schedule: found "cosin" \(str\); .*"warmup_stable_decay"',
        ),
        (
            "train.decay_steps",
            5,
            r"decay_steps=5 is read only with schedule='warmup_stable_decay', found "
            r"schedule='linear'; remove one of them",
        ),
        ("train.decay_steps", 0, r"^train\.decay_steps: found 0 \(int\); expected a whole number"),
        ("train.validation_every_steps", 5, r"needs data\.validation, which is not set"),
        ("train.adam_betas", [0.9], r"^train\.adam_betas: found \[0\.9\]"),
        (
            "train.micro_batch_size",
            9,
            r"micro_batch_size=9 is more than global_batch_size=8; lower it, or set it to",
        ),
        ("run", {}, r"^run\.folder: missing, a value is required$"),
        ("relations.pairs", {"qx": 1.0}, r"unknown pair 'qx', expected some of qq, qk"),
        ("relations.pairs", {"qq": 0.0}, r"no pair has a weight above 0"),
        ("students", {}, r"students has 0 entries"),
        (
            "students",
            dict.fromkeys(("a", "a-best"), BASE["students"]["l3"]),
            r"students\.a-best: the best student 'a' is exported under this name; rename it",
        ),
        (
            "students.l3.warmup_steps",
            10_000,
            r"students\.l3\.warmup_steps=10000 is more than train",
        ),
        ("students", {"a b": BASE["students"]["l3"]}, r"students\.a b: use only letters"),
        ("students.l3.layer_map", [1, 2, 3], r"layer_map is read only with init='teacher'"),
        (
            "engine.fsdp",
            {"ofload": True},
            r"engine\.fsdp\.ofload: unknown key; did you mean 'cpu_offload'",
        ),
    ],
)
def test_bad_setting_is_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(changed(path, value))


def test_the_decay_begins_after_the_warm_up() -> None:
    tree = changed("train.schedule", "warmup_stable_decay")
    tree["train"] |= {"warmup_steps": 3, "decay_steps": 7}
    assert parse_config(tree).train.decay_steps == 7
    tree["train"]["decay_steps"] = 8
    with pytest.raises(
        ConfigError,
        match="warmup_steps=3 and decay_steps=8 are together more than max_steps=10; lower one",
    ):
        parse_config(tree)


def test_layer_map_has_one_entry_per_layer() -> None:
    tree = changed("students.l3.layer_map", [1, 2])
    tree["students"]["l3"]["init"] = "teacher"
    with pytest.raises(
        ConfigError, match="layer_map names 2 teacher layers, expected num_layers=3"
    ):
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
    assert (config.teacher.layer, config.relations.num_heads, config.data.sequence_length) == (
        21,
        64,
        512,
    )
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
        path,
        [
            "train.max_steps=20",
            "teacher.model=org/name",
            "run.deterministic=true",
            "train.max_steps=30",
        ],
    )
    assert (config.train.max_steps, config.teacher.model, config.run.deterministic) == (
        30,
        "org/name",
        True,
    )
    with pytest.raises(ConfigError, match=r"--set train\.max_steps: expected KEY=VALUE"):
        load_config(path, ["train.max_steps"])
    with pytest.raises(ConfigError, match="'max_steps' is a value, not a block"):
        load_config(path, ["train.max_steps.x=1"])
    with pytest.raises(ConfigError, match=r"trian: unknown key; did you mean 'train'\?"):
        load_config(path, ["trian.max_steps=1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.warmup_steps=11", "train: warmup_steps=11 is more than max_steps=10; lower it"),
        ("students={}", "students has 0 entries, expected at least one"),
        ("train.max_steps=0", "train.max_steps: found 0 (int); expected"),
        ("relations.pairs.qx=1", "relations.pairs: unknown pair 'qx'"),
    ],
)
def test_errors_of_the_command_line_name_no_line_of_the_file(
    override: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.json"
    own = {
        "train": {**BASE["train"], "warmup_steps": 1},
        "relations": {"num_heads": 12, "pairs": {"qq": 1}},
    }
    path.write_text(json.dumps({**BASE, **own}))
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        load_config(path, [override])


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "quickstart.json").write_text("{")
    with pytest.raises(
        ConfigError, match=r"quikstart\.json: no such file; did you mean .*quickstart\.json\?"
    ):
        load_config(tmp_path / "quikstart.json")
    with pytest.raises(ConfigError, match=r"not valid JSON: .* line 1"):
        load_config(tmp_path / "quickstart.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="found a JSON list, expected an object"):
        load_config(tmp_path / "list.json")
    (tmp_path / "twice.json").write_text('{"run": {}, "run": {}}')
    with pytest.raises(ConfigError, match="the key 'run' occurs twice"):
        load_config(tmp_path / "twice.json")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", "", "the file is empty; `scaledistill init` writes one to start from"),
        ("x.json", " \n ", "the file is empty"),
        (
            "x.json",
            '{\n  "run": {}, // mine\n  "data": {}}',
            "a comment ('// mine') in line 2; JSON has none: remove it",
        ),
        ("x.json", '# mine\n{"run": {}}', "a comment ('# mine') in line 1"),
        ("x.json", '{"run": /* mine */ {}}', "a comment ('/* mine */ {}}') in line 1"),
        (
            "x.json",
            '{"run": {\n  "folder": "x",\n}}',
            "a comma after the last entry in line 2; remove it",
        ),
        ("x.json", '{"run": [1,\n 2, ]}', "a comma after the last entry in line 2; remove it"),
        (
            "x.json",
            '{"run": {}\n"data": {}}',
            "a comma or a closing bracket is missing in line 1, before '\"data\": {}}'",
        ),
        ("x.json", "{'run': {}}", "single quotes in line 1; JSON has double quotes only"),
        ("x.json", '{"run": True}', "True in line 1; write true"),
        ("x.json", '{"run": None}', "None in line 1; write null, or leave the key out"),
        ("x.json", '{"run": {\n', "the file ends before its brackets are closed, in line 2"),
        ("x.json", "run:\n  folder: x\n", "it is YAML, or something like it, in line 1; rename it"),
        (
            "x.toml",
            '[run]\nfolder = "x"\n',
            "it is TOML, or something like it, in line 1; write it as YAML",
        ),
        ("x.json", b"\xff\xfe{}", "not UTF-8 text"),
        ("x.yaml", "run:\n\tfolder: x", "not valid YAML: line 2 has a tab; indent with spaces"),
        ("x.yaml", "a: b: c", "line 1 has a ':' within a value, or is indented more than"),
        ("x.yml", "a: 1\nb:\n  c: 1\n  c: 2", "the key 'c' occurs twice, in lines 3 and 4; rem"),
        ("x.yaml", "a: &b [*b]", "line 1 contains itself by an alias ('*…'); write it out"),
        ("x.yaml", "a: !!python/name:os.system x", "line 1 has a tag ('!…'), which settings do n"),
        ("x.yaml", "a: 1\n---\nb: 1", "a second document ('---') starts in line 2; keep one"),
        ("x.yaml", "a: [1,", "the file ends before its brackets or quotes are closed, in line 1"),
        ("x.yaml", "a: @x", "a value in line 1 starts with '@'; put it in quotes"),
        ("x.yaml", "a: 1\n3: 1", "a key in line 2 is not text but '3' (int); put it in quotes"),
        ("x.yaml", "- a", "found a YAML list, expected an object with blocks such as 'teacher'"),
        ("x.yaml", "a: \x00", "unacceptable character"),
    ],
)
def test_what_is_wrong_with_a_file(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / name)
    assert str(caught.value).startswith(f"--config {tmp_path / name}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(BASE).encode())
    assert load_config(tmp_path / "x.json") == parse_config(BASE)


def test_where_a_file_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text("{}")
    for given, where in [
        ("mine", "did you mean mine.json?"),
        ("mnie.json", "did you mean mine.json?"),
        ("quickstart", f"did you mean {CONFIGS / 'quickstart.json'}?"),
        ("configs/large_to_l6.json", f"did you mean {CONFIGS / 'large_to_l6.json'}?"),
        ("larg_to_l6.json", f"did you mean {CONFIGS / 'large_to_l6.json'}?"),
        ("else/where.json", "`scaledistill init` writes one to start from"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load_config(given)
        assert (
            str(caught.value)
            == f"--config {given}: no such file in the working folder {tmp_path}; {where}"
        )
    with pytest.raises(
        ConfigError,
        match=r"found a folder, expected a JSON or YAML file; give a file in it: .*mine",
    ):
        load_config(tmp_path)


def test_numbers_as_text(tmp_path: Path) -> None:
    """The shell removes the quotes of "2024"."""
    (tmp_path / "x.json").write_text(json.dumps(BASE))
    config = load_config(tmp_path / "x.json", ["run.folder=2024", "train.max_steps=2024"])
    assert (config.run.folder, config.train.max_steps) == ("2024", 2024)
    with pytest.raises(
        ConfigError, match=r"train\.max_steps: found 0\.5 \(float\); expected a whole"
    ):
        load_config(tmp_path / "x.json", ["train.max_steps=0.5"])


def test_a_student_that_is_not_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(BASE))
    with pytest.raises(
        ConfigError,
        match=(
            r"^--set students\.l6\.hidden_size=8: there is no student 'l6' in the file; use "
            r"students\.l3, or to add it, set students\.l6\.num_layers and "
            r"students\.l6\.num_attention_heads too$"
        ),
    ):
        load_config(tmp_path / "x.json", ["students.l6.hidden_size=8"])
    with pytest.raises(ConfigError, match=r"there is no student 'l6' in the file; use students"):
        load_config(tmp_path / "x.json", ['students={"l6": {"num_layers": 2, "hidden_size": 8}}'])
    added = ["num_layers=3", "hidden_size=8", "num_attention_heads=2"]
    config = load_config(tmp_path / "x.json", [f"students.l6.{each}" for each in added])
    assert list(config.students) == ["l3", "l6"]
    assert config.students["l6"].num_layers == 3
    assert (
        load_config(tmp_path / "x.json", ["students.l3.hidden_size=8"]).students["l3"].hidden_size
        == 8
    )


def test_paths_that_lie_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    project, here = tmp_path / "project", tmp_path / "here"
    for folder in (
        here,
        project / "configs",
        project / "shards" / "train",
        project / "runs" / "x" / "checkpoints",
    ):
        folder.mkdir(parents=True)
    path = project / "configs" / "x.json"
    tree = changed("data.train", "shards/train")
    for word in ("random", "teacher"):  # no paths, whatever folders there are
        (project / word).mkdir()
        tree["students"]["l3"]["init"] = word
    path.write_text(json.dumps(tree))
    config = load_config(path)
    monkeypatch.chdir(project)
    check_paths(config, path)
    assert caplog.text == ""
    monkeypatch.chdir(here)
    with pytest.raises(ConfigError) as caught:
        check_paths(config, path)
    assert str(caught.value) == (
        f"data.train='shards/train' is not in the working folder {here}, but in {project}; start "
        f"the command there (cd {project}), or give the whole path, {project / 'shards' / 'train'}"
    )
    assert (
        f"starts a new run in the working folder {here}; to resume the run in "
        f"{project / 'runs' / 'x'}" in caplog.text
    )


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
    assert differing_keys(
        old, parse_config(changed("relations.pairs", {"vv": 1.0})).model_dump()
    ) == [
        "relations.pairs.kk: 1.0 -> null",
        "relations.pairs.qq: 1.0 -> null",
    ]


def test_what_a_resume_may_change_is_marked_where_it_is_declared() -> None:
    assert {"run.folder", "teacher.model", "train.micro_batch_size", "engine"} <= may_change()
    kept = {"run.seed", "teacher.layer", "students", "relations.pairs", "train.learning_rate"}
    assert not kept & may_change()


def test_free_keys_exist() -> None:
    tree = parse_config(BASE).model_dump()
    for path in may_change():
        node: Any = tree
        for part in path.split("."):
            node = node[part]
