"""`scaledistill init`; the rest of it is tested from the wheel, in test_packaging."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaledistill.cli.init import main
from scaledistill.config.load import load_config

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["x.yaml", "x.yml", "x.json", None])
def test_a_preset_is_written(name: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "quickstart", *filter(None, [name])]) == 0
    file = Path(name or "quickstart.yaml")
    assert capsys.readouterr().out.splitlines() == [
        f"written: {file}",
        "next: set teacher.model, data.train and the sizes in it, then",
        f"      scaledistill distill --config {file} --validate",
    ]
    # A clone's Makefile fills the folder that its preset names.
    hub = ["teacher.model=sentence-transformers/all-MiniLM-L6-v2"]
    assert load_config(file) == load_config(ROOT / "configs" / "quickstart.json", hub)
    assert ("# Optimizer steps of the run." in file.read_text()) == (name != "x.json")


def test_the_next_command_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "quickstart", "my file.yaml"]) == 0
    assert "--config 'my file.yaml' --validate" in capsys.readouterr().out


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list((ROOT / "configs").glob("*.json")))
    assert (
        f"{'large_to_l6_a6000':22}  bert-large-uncased layer 21 → 6×384, 256×512 tokens, 400,000 "
        "steps, optimizer state in host memory" in lines
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--preset quikstart", "--preset quikstart: no such preset; did you mean quickstart?"),
        ("--preset zzz", "--preset zzz: no such preset; there are base_to_l6, deberta_v3_large"),
        (
            "--preset quickstart x.txt",
            "x.txt: found the suffix '.txt', expected .yaml, .yml or .json",
        ),
        ("--preset quickstart no/x.yaml", "no/x.yaml: no folder no; make it first"),
        ("--preset quickstart mine.yaml", "mine.yaml exists; name another file, or replace with"),
        ("x.yaml", "to write x.yaml, name a preset: --preset NAME (--list shows the names)"),
        ("", "--preset NAME is missing; --list shows the names"),
        ("--prest quickstart", "unknown option --prest; did you mean --preset?"),
    ],
)
def test_what_is_refused(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("mine")
    try:
        code = main(arguments.split())
    except SystemExit as end:
        code = int(end.code or 0)
    assert (code, Path("mine.yaml").read_text()) == (2, "mine")
    captured = capsys.readouterr()
    assert captured.err.startswith(f"scaledistill init: {message}")
    assert [path.name for path in Path().iterdir()] == ["mine.yaml"]
    assert main(["--preset", "quickstart", "mine.yaml", "--force"]) == 0
    assert Path("mine.yaml").read_text() != "mine"
