"""The command `scaledistill`: its subcommands are found, quick, and misspelt ones get a hint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scaledistill import __version__
from scaledistill.cli.command import SUBCOMMANDS, main, overview

ROOT = Path(__file__).parent.parent
GROUPS = sorted({name.split()[0] for name in SUBCOMMANDS if " " in name})
# What the help of no subcommand needs; pydantic alone takes half of the time that it may take.
HEAVY = {
    *("torch", "transformers", "deepspeed", "datasets", "accelerate", "matplotlib", "pyarrow"),
    *("numpy", "rich", "pydantic", "yaml"),
}
# Each help in a process forked from one that has only imported the command, as if it were started.
MEASURE = """
import contextlib, io, json, os, sys, time
from scaledistill.cli.command import main
start = time.process_time()
for name in sys.argv[1:]:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, name
        continue
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            main([*name.split(), "--help"])
        except SystemExit as end:
            assert not end.code
    seconds = start + time.process_time()
    print(json.dumps([name, seconds, list(sys.modules), shown.getvalue()]), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[float, list[str], str]]:
    """The processor seconds, the imported modules and the text of each help."""
    names = ["", *GROUPS, *SUBCOMMANDS]
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, *names],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    rows = [json.loads(line) for line in ended.stdout.splitlines()]
    return {name: (seconds, modules, text) for name, seconds, modules, text in rows}


@pytest.mark.parametrize("name", ["", *GROUPS, *SUBCOMMANDS])
def test_help_is_quick_and_ends_with_two_examples(
    name: str, helps: dict[str, tuple[float, list[str], str]]
) -> None:
    seconds, modules, text = helps[name]
    # Of processor time, which other processes on the machine change little.
    assert seconds < 0.3
    assert not HEAVY & set(modules)
    usage, _, rest = text.partition("\n")
    assert usage.startswith(f"usage: scaledistill {name}".rstrip())
    assert all(len(line) <= 100 for line in rest.splitlines())
    examples = rest.rpartition("\nexamples:\n")[2].replace("\\\n", " ").splitlines()
    assert len(examples) == 2
    assert all(line.startswith(f"  scaledistill {name}".rstrip() + " ") for line in examples)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("distil", "unknown subcommand 'distil'; did you mean scaledistill distill?"),
        ("train", "unknown subcommand 'train'; did you mean scaledistill distill?"),
        ("shards chek x", "unknown subcommand 'shards chek'; did you mean scaledistill shards ch"),
        ("shard make", "unknown subcommand 'shard'; did you mean scaledistill shards make?"),
        ("evaluate --model x", "unknown subcommand 'evaluate'; did you mean scaledistill glue?"),
        ("xyzzy", "unknown subcommand 'xyzzy'\n"),
        ("--config x.json", "the option --config belongs to a subcommand; did you mean scaledisti"),
        ("shards --tokenizer x", "did you mean scaledistill shards make --tokenizer …?"),
    ],
)
def test_misspelt_subcommands(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.endswith("\nTry 'scaledistill --help'.\n")


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["train"] == {
        "$ref": "#/$defs/TrainSettings"
    }


def test_the_overview_has_all_and_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["help"], ["--help"]):
        assert main(words) == 0
        assert capsys.readouterr().out == overview()
    assert all(f"  {name} " in overview() for name in SUBCOMMANDS)
    assert main(["shards"]) == 0
    assert "shards check" in (shown := capsys.readouterr().out)
    assert "distill " not in shown.partition("subcommands:")[2].partition("examples:")[0]
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"scaledistill {__version__}\n"
