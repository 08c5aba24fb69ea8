"""What README and docs show runs as pasted."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import lzma
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import glue_stub
import pytest
from conftest import WORDS
from ranks import run_ranks

from scaledistill.cli.command import SUBCOMMANDS
from scaledistill.config.presets import find_preset
from scaledistill.errors import ConfigError
from scaledistill.storage.files import read_json

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
sys.path.append(str(ROOT / "tools"))
import architectures  # noqa: E402 - in tools
import configuration  # noqa: E402

TOOLS = {
    "launch/distill.py": "distill",
    "tools/make_shards.py": "shards make",
    "tools/check_shards.py": "shards check",
    "tools/glue.py": "glue",
}
"""The subcommand that does the same."""

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before.*optimizer.step:UserWarning"),
]


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def shell_lines(page: Path) -> list[str]:
    """Return the lines of a page's shell blocks, continued ones joined."""
    return [
        line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()
    ]


@pytest.mark.parametrize("made", [architectures, configuration], ids=lambda made: made.__name__)
def test_made_pages_are_current(made: Any) -> None:
    name = made.__name__
    assert (ROOT / f"docs/{name}.md").read_text(encoding="utf-8") == made.page(), (
        f"run: python tools/{name}.py > docs/{name}.md"
    )


def write_encoder(folder: Path, tokenizer: Path, **sizes: int) -> None:
    """Write a random BERT with the tiny tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    config = BertConfig(**{"vocab_size": 200, "max_position_embeddings": 128} | sizes)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def run(codes: list[str]) -> dict[str, Any]:
    """Run the blocks one after the other, as pasted into one session."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for code in codes:
        exec(compile(code, "pasted", "exec"), names)
    return names


def run_page(folder: Path) -> tuple[float, bool, str]:
    """Run the blocks of docs/python.md in a folder; return the loss, whether the student got a
    gradient, how the run ended.
    """
    os.chdir(folder)
    session = run(blocks(ROOT / "docs/python.md", "python"))
    gradient = session["student"].get_input_embeddings().weight.grad
    return session["loss"].total.item(), gradient is not None, session["result"].state


@pytest.mark.docs
def test_the_python_page(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder as `make quickstart` leaves it, with smaller models."""
    from scaledistill.data.prepare.make import make_shards
    from scaledistill.data.prepare.text import load_tokenizer

    monkeypatch.chdir(tmp_path)
    teacher = {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 768,
    }
    student = {
        "hidden_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "intermediate_size": 64,
    }
    write_encoder(Path("models/all-MiniLM-L6-v2"), tiny_teacher, **teacher)
    write_encoder(Path("runs/quickstart/export/l3-h192"), tiny_teacher, **student)
    make_shards(
        (" ".join([WORDS[number % 190], *WORDS[: 20 + number % 100]]) for number in range(300)),
        Path("shards/quickstart"),
        tokenizer=load_tokenizer(tiny_teacher),
        sequence_length=128,
        source={"kind": "test"},
        held_out_fraction=0.2,
        workers=0,
    )
    Path("configs").symlink_to(ROOT / "configs")
    [(loss, has_gradient, state)] = run_ranks(run_page, 1, tmp_path)
    assert loss > 0
    assert (has_gradient, state, Path("runs/from-python/export/l3-h192").is_dir()) == (
        True,
        "done",
        True,
    )


@pytest.mark.docs
def test_migrating_s_python(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With local folders in place of the hub's, and one step of the 400,000."""
    import datasets
    from transformers import TrainerCallback, trainer

    from scaledistill.glue import worker

    class StopEarly(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 1

    def load_dataset(name: str, config: str, split: str) -> datasets.Dataset:
        if name == "wikimedia/wikipedia":
            return datasets.Dataset.from_dict({"title": ["t"] * 300, "text": ["w001 w002"] * 300})
        columns = {"mnli": ("premise", "hypothesis"), "rte": ("sentence1", "sentence2")}[config]
        return datasets.Dataset.from_dict(
            {column: ["w001 w002"] * 4 for column in columns} | {"label": [0, 1, 1, 0]}
        )

    monkeypatch.chdir(tmp_path)
    sizes = {
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    }
    write_encoder(Path("google-bert/bert-base-uncased"), tiny_teacher, **sizes)
    monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, StopEarly])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(worker, "COMMAND", glue_stub.COMMAND)
    script, evaluation = blocks(ROOT / "docs" / "migrating.md", "python")
    session = run([script, evaluation])
    assert session["trainer"].state.global_step == 1
    assert list(session["create_summary_table"]("results").index) == ["distilled-model"]


def shell_commands() -> Iterator[Any]:
    """Yield the commands of ours in the pages' shell blocks, with the options that stand for others
    left out.
    """
    for page in PAGES:
        for line in shell_lines(page):
            words = shlex.split(line, comments=True)
            name = f"{page.stem}: {line[:60]}"
            for tool, subcommand in TOOLS.items():
                if tool in words and "…" not in words:
                    rest = words[words.index(tool) + 1 :]
                    yield pytest.param(subcommand, rest, id=name)
            if words[:1] == ["scaledistill"] and "…" not in words:
                [subcommand] = [
                    each for each in SUBCOMMANDS if words[1 : 1 + len(each.split())] == each.split()
                ]
                rest = words[1 + len(subcommand.split()) :]
                yield pytest.param(subcommand, rest, id=name)


@pytest.mark.parametrize(("subcommand", "arguments"), list(shell_commands()))
def test_shell_commands_are_understood(
    subcommand: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from scaledistill.config.load import load_config

    monkeypatch.chdir(ROOT)
    arguments = list(itertools.takewhile(lambda word: word not in (">", "|"), arguments))
    module = importlib.import_module(f"scaledistill.cli.{SUBCOMMANDS[subcommand].module}")
    parse = module.parser()
    if subcommand == "shards make":  # its inputs may stand between the options
        parse.parse_intermixed_args(arguments)
        return
    options = parse.parse_args(arguments)
    if subcommand == "init" and options.preset:
        find_preset(options.preset)
    if subcommand == "distill" and options.config not in ("FILE", "my.yaml", None):
        load_config(options.config, options.overrides)


def test_wrong_commands_would_be_noticed() -> None:
    from scaledistill.cli import distill as cli
    from scaledistill.config.load import load_config

    assert len(list(shell_commands())) > 5
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        cli.parser().parse_args(["--config", "x.json", "--no-such-option"])
    with pytest.raises(ConfigError):
        load_config(str(ROOT / "configs" / "quickstart.json"), ["train.no_such_key=1"])


def write_models_and_data(tokenizer: Path) -> None:
    """Write small folders with the names of what the first pages load from the hub."""
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 64,
        "max_position_embeddings": 512,
    }
    write_encoder(Path("google-bert/bert-large-uncased"), tokenizer, **sizes)
    texts = [" ".join(WORDS[number % 90 : 90 + number % 100]) for number in range(2000)]
    write_dataset(
        Path("wikimedia/wikipedia"),
        {"20231101.en": {"train": [{"title": "t", "text": text} for text in texts]}},
    )
    pairs = [
        {"sentence1": text, "sentence2": text[:40], "label": number % 2, "idx": number}
        for number, text in enumerate(texts[:64])
    ]
    splits = dict.fromkeys(("train", "validation", "test"), pairs)
    write_dataset(Path("nyu-mll/glue"), {"mrpc": splits, "rte": splits})
    Path("corpus").mkdir()
    with lzma.open("corpus/a.txt.xz", "wt") as file:
        file.write("\n\n".join(texts))


def write_dataset(folder: Path, configs: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Write rows by configuration and split as a dataset of the hub."""
    folder.mkdir(parents=True)
    described = []
    for config, splits in configs.items():
        for split, rows in splits.items():
            path = folder / config / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = [{"split": split, "path": f"{config}/{split}.jsonl"} for split in splits]
        described.append({"config_name": config, "data_files": files})
    (folder / "README.md").write_text(f"---\n{json.dumps({'configs': described})}\n---\n")


SHORTER = {
    "max_steps: 400000": "max_steps: 2",
    "warmup_steps: 4000": "warmup_steps: 1",
    "global_batch_size: 256": "global_batch_size: 2",
    "micro_batch_size: 32": "micro_batch_size: 2",
    "precision: bf16": "precision: auto",  # slow on CPUs without bf16 units
}


@pytest.mark.docs
@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_first_commands_run(
    page: str, tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From an empty folder, with a small teacher and little data in place of the hub's, and two
    steps of the 400,000.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_models_and_data(tiny_teacher)
    commands = [line for line in shell_lines(ROOT / page) if line.startswith("scaledistill ")]
    assert len(commands) >= 5
    for command in commands:
        ended = subprocess.run(
            command, shell=True, check=False, capture_output=True, text=True, timeout=600
        )
        said = f"{command}\n{ended.stdout}{ended.stderr}"
        assert ended.returncode == 0, said
        assert "Traceback" not in said, said
        if "--preset" in command:
            settings = Path("my.yaml").read_text()
            for setting, shorter in SHORTER.items():
                assert setting in settings
                settings = settings.replace(setting, shorter)
            Path("my.yaml").write_text(settings)
    assert read_json(Path("runs/large_to_l6/status.json"))["state"] == "done"
    assert Path("l6/modules.json").is_file()


@pytest.mark.docs
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the encoder of `make quickstart` in place of the hub's."""
    import nbformat
    from nbclient import NotebookClient

    teacher = ROOT / "models/all-MiniLM-L6-v2"
    if not teacher.is_dir():
        pytest.skip("needs models/all-MiniLM-L6-v2: make models/all-MiniLM-L6-v2")
    monkeypatch.setenv("TEACHER", str(teacher))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(ROOT / "docs/first_student.ipynb", as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    assert re.search(r"tensor\(\[\[ ?1\.0", printed), printed[-2000:]
    assert (tmp_path / "first/export/l3-h192").is_dir()
