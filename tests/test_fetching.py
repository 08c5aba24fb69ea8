"""What a run asks the hub for, counted by a hub of our own."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import COMMIT, FakeHub, use_hub
from ranks import run_ranks
from test_train import distil, make_tree, status_of

from scaledistill.config.load import parse_config
from scaledistill.errors import DataError
from scaledistill.models.teacher import check_weight_files, load_encoder, resolve_folder
from scaledistill.preflight import checks

__all__ = ["make_tree"]
NAME, REVISION = "some-org/tiny", "GET /api/models/some-org/tiny/revision/main"
CPU = torch.device("cpu")


def distil_from_hub(trees: list[dict[str, Any]], url: str, cache: Path) -> list[Any]:
    """Return how each run ended, and how often this rank asked for a snapshot."""
    import huggingface_hub

    from scaledistill.distributed.ranks import process_group

    asked: list[str | None] = []
    download = huggingface_hub.snapshot_download

    def counted(name: str, *, revision: str | None, **options: Any) -> str:
        asked.append(revision)
        return download(name, revision=revision, **options)

    with pytest.MonkeyPatch.context() as patch, process_group(60):
        use_hub(patch, url, cache)
        patch.setattr(huggingface_hub, "snapshot_download", counted)
        ends = []
        for tree in trees:
            end = distil(tree)
            ends.append((end, asked.copy()))
            asked.clear()
        return ends


def test_one_rank_asks_for_all(
    make_tree: Callable[..., dict[str, Any]], tiny_teacher: Path, tmp_path: Path
) -> None:
    steps = {"train": {"max_steps": 2, "validation_every_steps": 0}}
    whole = make_tree("whole", teacher={"model": NAME}, **steps)
    again = make_tree("again", teacher={"model": NAME}, **steps)
    missing = make_tree("missing", teacher={"model": "some-org/no-such-model"}, **steps)
    with FakeHub(NAME, tiny_teacher) as hub:
        first, second = run_ranks(
            distil_from_hub, 2, [whole, again, missing], hub.url, tmp_path / "cache"
        )
        asked = Counter(hub.take())
    assert [end[0][:2] for end in first[:2]] == [("done", 0)] * 2
    assert [calls for _, calls in first] == [[None, COMMIT], [None, COMMIT], [None]]
    assert [calls for _, calls in second] == [[], [], []], "no rank but the first of a machine asks"
    assert asked.pop(REVISION) == 2, "the name is resolved once a run"
    assert asked.pop("GET /api/models/some-org/no-such-model/revision/main") == 1
    assert set(asked.values()) == {1}, "each file is fetched once"
    assert any(path.endswith("/model.safetensors") for path in asked)
    (kind, code, message), _ = first[2]
    assert (kind, code) == ("DataError", 3)
    assert message.startswith(
        "teacher.model='some-org/no-such-model' is not a folder, and the hub gave no such model ("
    )
    # What is written names the model as it was given.
    folder = Path(whole["run"]["folder"])
    assert f"| teacher | `{NAME}`, layer" in (folder / "export" / "l2" / "README.md").read_text()
    assert json.loads((folder / "config.json").read_text())["teacher"]["model"] == NAME
    [state] = folder.glob("checkpoints/*/state.json")
    assert json.loads(state.read_text())["config"]["teacher"]["model"] == NAME
    assert str(tmp_path / "cache") not in (folder / "export" / "l2" / "config.json").read_text()
    assert (folder / "export" / "l2" / "tokenizer.json").is_file()
    assert status_of(whole)["state"] == "done"


def test_a_check_asks_once_and_fetches_no_weights(
    make_tree: Callable[..., dict[str, Any]],
    tiny_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = parse_config(make_tree(teacher={"model": NAME}))
    with FakeHub(NAME, tiny_teacher) as hub:
        use_hub(monkeypatch, hub.url, tmp_path / "cache")
        assert checks.plan_run(config, 1, CPU).run.config.teacher.model == NAME
        asked = hub.take()
        assert asked.count(REVISION) == 1
        assert not any("safetensors" in path for path in asked)
        checks.plan_run(config, 1, CPU)
        assert REVISION in hub.take(), "the next check asks again: the branch may have moved"
    checks.plan_run(config, 1, CPU)  # without a network, from the cache
    with pytest.raises(
        DataError,
        match=r"teacher.model='some-org/other' is not a folder, and the hub gave no such mod",
    ):
        checks.plan_run(parse_config(make_tree(teacher={"model": "some-org/other"})), 1, CPU)


def test_a_model_without_safetensors_on_the_hub(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "published"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with FakeHub(NAME, folder) as hub:
        use_hub(monkeypatch, hub.url, tmp_path / "cache")
        with pytest.raises(
            DataError,
            match=rf"^model='{NAME}' has no model.safetensors on the hub; .* convert them once: "
            rf"AutoModel.from_pretrained\('{NAME}', use_safetensors=False\).save_pretrained",
        ):
            load_encoder(NAME)
        assert not any(".bin" in path for path in hub.take()), "they are never downloaded"


def test_weights_that_were_not_downloaded(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network, some versions of the hub's client return an incomplete folder."""
    message = r"lacks model.safetensors in the hub's cache \(.*\); rerun where there is a network"
    with FakeHub(NAME, tiny_teacher) as hub:
        use_hub(monkeypatch, hub.url, tmp_path / "cache")
        folder = resolve_folder(NAME, None, ["config.json"])
        with pytest.raises(DataError, match=message):
            check_weight_files(folder, NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=message):
        check_weight_files(folder, NAME)
