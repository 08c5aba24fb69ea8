"""Uploads of exports, to a hub on this machine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_hub import UploadHub, use_hub
from huggingface_hub import ModelCard

from scaledistill.cli import push

TOKEN = "hf_" + "secret" * 5


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """A folder with the files of an export in several formats, and some that do not belong."""
    folder = tmp_path / "l6"
    (folder / "onnx").mkdir(parents=True)
    (folder / "1_Pooling").mkdir()
    card = "---\nlibrary_name: transformers\ntags: [minilmv2]\n---\n\n# l6\n\n## Licence\n\nNone.\n"
    (folder / "README.md").write_text(card)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    (folder / "onnx" / "model.onnx").write_bytes(b"onnx")
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / ".lock").write_text("")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "left-over").write_text("")
    (tmp_path / "private").write_text("elsewhere")
    (folder / "link").symlink_to(tmp_path / "private")
    return folder


FILES = {
    "1_Pooling/config.json",
    "onnx/model.onnx",
    "README.md",
    "config.json",
    "model.safetensors",
}


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs the command against a hub; with exit code and output."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(logging.getLogger("scaledistill"), "level", logging.INFO)

    def run(hub: UploadHub, *arguments: object) -> tuple[int, str, str]:
        use_hub(monkeypatch, hub.url, tmp_path / "cache")
        code = push.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def listed(output: str) -> dict[str, int]:
    lines = [line.split() for line in output.splitlines() if line.startswith("  ")]
    return {path: int(size.replace(",", "")) for size, path in lines}


def test_only_a_list_without_yes(export: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    before = (export / "README.md").read_bytes()
    with UploadHub() as hub:
        code, out, _ = run(hub, export, "--repo", "me/l6", "--licence", "mit")
        assert (code, hub.commits, hub.created, hub.tokens) == (0, [], [], set())
    assert listed(out) == {name: (export / name).stat().st_size for name in FILES}
    assert "README.md: license becomes mit" in out
    assert "README.md: names no teacher; --base-model NAME states its hub name" in out
    assert (
        "5 files, 0.0 MB would go to me/l6; files that only an older export there has would be"
        in out
    )
    _, out, _ = run(hub, export, "--repo", "me/l6", "--licence", "mit", "--private")
    assert "would go to me/l6 (private if it is new); files that only" in out
    assert (export / "README.md").read_bytes() == before


def test_what_was_listed_goes_folder_by_folder(
    export: Path, run: Callable[..., tuple[int, str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with UploadHub() as hub:
        code, out, err = run(
            hub, export, "--repo", "me/l6", "--licence", "mit", "--base-model", "org/large",
            "--private", "--yes",
        )  # fmt: skip
        assert code == 0, err
        assert hub.files == {name: (export / name).read_bytes() for name in FILES}
        assert set(listed(out)) == FILES
        assert [{Path(path).parent.name for path in paths} for paths in hub.commits] == [
            {"1_Pooling"},
            {"onnx"},
            {""},
        ]
        assert hub.created[0]["visibility"] == "private"
        assert hub.tokens == {f"Bearer {TOKEN}"}
    card = ModelCard(hub.files["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("mit", "org/large")
    assert card.data["base_model_relation"] == "finetune"
    assert "mit. Check that" in card.text
    assert TOKEN not in out + err + caplog.text


def test_what_only_an_older_export_had_is_removed(
    export: Path, run: Callable[..., tuple[int, str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    removed = ["0_Transformer/model.safetensors", "modules.json", "onnx/model_int8.onnx"]
    kept = ["notes/mine.md", ".gitattributes", "onnx/model_quantized.onnx", "onnx/model_O2.onnx"]
    with UploadHub() as hub:
        foreign = [*removed, *kept, "onnx/model.onnx", "config.json"]
        hub.files = dict.fromkeys(foreign, b"old")
        assert run(hub, export, "--repo", "me/l6", "--licence", "mit", "--yes")[0] == 0
        assert set(hub.files) == FILES | set(foreign), "no export of ours was there"
        hub.files = dict.fromkeys([*foreign, "scaledistill.json"], b"old")
        code, _, err = run(hub, export, "--repo", "me/l6", "--licence", "mit", "--yes")
        assert code == 0, err
        assert [path for path, data in hub.files.items() if data == b"old"] == kept
        removed.append("scaledistill.json")
        assert set(hub.files) == FILES | set(kept)
    assert f"removing files of an older export: {', '.join(removed)}" in caplog.text


def test_a_refusal_states_no_token(
    export: Path, run: Callable[..., tuple[int, str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with UploadHub(refuses=True) as hub:
        code, out, err = run(hub, export, "--repo", "me/l6", "--licence", "mit", "--yes")
    assert code == 3
    assert "me/l6 was not uploaded: " in err
    assert "Bearer <token> may not write" in err
    assert err.rstrip().endswith("use a token that may write to it, and check its owner's name")
    assert TOKEN not in out + err + caplog.text


def test_what_cannot_be_pushed(
    export: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "empty").mkdir()
    with UploadHub() as hub:
        for arguments, code, message in (
            ([export, "--repo", "me/l6"], 2, "--licence: the model card states none, and neither"),
            ([export, "--repo", "l6"], 2, "--repo 'l6' is not a repository; use name/id"),
            ([export, "--repo", "me/l 6"], 2, "--repo 'me/l 6' is not a repository"),
            ([tmp_path / "l66", "--repo", "me/l6"], 3, "no such folder; did you mean"),
            ([tmp_path / "empty", "--repo", "me/l6"], 3, "has no usable README.md"),
        ):
            found, _, err = run(hub, *arguments, "--yes")
            assert (found, message in err) == (code, True), err
        assert not hub.created
