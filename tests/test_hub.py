from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from scaledistill.models.hub import (
    UnavailableError,
    known_models,
    learn,
    model_folder,
    names_resolved_once,
)


class Branch:
    """A model's branch; each download finds it one commit further unless it asks for a commit."""

    def __init__(self, root: Path) -> None:
        self._root, self.asked = root, []

    def download(self, revision: str | None) -> str:
        self.asked.append(revision)
        commit = revision if revision and len(revision) == 40 else f"{len(self.asked):040x}"
        folder = self._root / "snapshots" / commit
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)


@pytest.fixture
def branch(tmp_path: Path) -> Branch:
    return Branch(tmp_path)


def offline(revision: str | None) -> str:
    raise OSError("no route to the hub")


def folder_of(
    download: Callable[[str | None], str], *patterns: str, revision: str | None = None
) -> Path:
    """Return the folder of the files, which `download` fetches at a revision."""

    def snapshot_download(name: str, *, revision: str | None, **_: object) -> str:
        return download(revision)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        return model_folder("some/model", revision, patterns)


def test_a_branch_that_moves_is_one_commit_to_a_run(branch: Branch) -> None:
    with names_resolved_once():
        config = folder_of(branch.download, "config.json", "*.py")
        assert folder_of(branch.download, "config.json") == config
        weights = folder_of(branch.download, "config.json", "*.safetensors")
        assert folder_of(branch.download, "*.py", "*.safetensors") == weights == config
        assert branch.asked == [None, config.name]
        other = folder_of(branch.download, "config.json", revision="v2")
        assert other != config
        assert branch.asked[2:] == ["v2"]
    with names_resolved_once():
        assert folder_of(branch.download, "config.json") not in (config, other)


def test_without_a_run_each_call_asks(branch: Branch) -> None:
    assert folder_of(branch.download, "config.json") != folder_of(branch.download, "config.json")
    learn({("some/model", None): "known"})
    assert known_models() == {}


def test_blocks_within_share_what_is_known(branch: Branch) -> None:
    @names_resolved_once()
    def check() -> Path:
        return folder_of(branch.download, "config.json")

    with names_resolved_once():
        assert check() == check()
    assert branch.asked == [None]
    check()
    check()
    assert branch.asked == [None] * 3


def test_a_failure_is_not_tried_again(branch: Branch) -> None:
    with names_resolved_once():
        with pytest.raises(OSError, match="no route"):
            folder_of(offline, "config.json")
        with pytest.raises(UnavailableError, match=r"^no route to the hub$"):
            folder_of(branch.download, "config.json")
        assert branch.asked == []
    assert folder_of(branch.download, "config.json").is_dir()


def test_another_rank_learns_what_is_known(branch: Branch, tmp_path: Path) -> None:
    with names_resolved_once():
        folder = folder_of(branch.download, "config.json")
        with pytest.raises(OSError, match="no route"):
            folder_of(offline, "config.json", revision="v2")
        known = known_models()
    with names_resolved_once():
        learn(known)
        assert folder_of(offline, "config.json") == folder
        with pytest.raises(UnavailableError, match=r"^no route to the hub$"):
            folder_of(branch.download, "config.json", revision="v2")
    folder.rmdir()
    with names_resolved_once():
        learn(known)
        assert folder_of(branch.download, "config.json") != folder, (
            "a folder that this rank does not see"
        )


def test_a_folder_that_is_no_commit_s(tmp_path: Path) -> None:
    asked: list[str | None] = []

    def download(revision: str | None) -> str:
        asked.append(revision)
        return str(tmp_path)

    with names_resolved_once():
        assert (
            folder_of(download, "a", revision="v2")
            == folder_of(download, "b", revision="v2")
            == tmp_path
        )
    assert asked == ["v2", "v2"]
