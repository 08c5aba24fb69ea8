"""Several data sets in one order: shares, ranks, exact resume, epochs, settings and a whole run."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from scaledistill.config.load import parse_config
from scaledistill.config.schema import DistillConfig
from scaledistill.data.mixture import MixedOrder, Source, data_identity, epochs, mix
from scaledistill.data.order import SampleOrder
from scaledistill.data.reader import ShardReader
from scaledistill.data.shards import ShardWriter
from scaledistill.data.stream import Batch, ShardStream
from scaledistill.errors import ConfigError, DataError
from scaledistill.metrics.recorder import read_rows
from scaledistill.preflight import checks, report
from scaledistill.storage.remote import ShardCache
from scaledistill.training.exports import export_checkpoint
from scaledistill.training.loop import distill

sys.path.append(str(Path(__file__).parent.parent / "tools"))
import check_shards

MakeConfig = Callable[..., DistillConfig]
CPU = torch.device("cpu")
WEIGHTS = [0.7, 0.2, 0.1]
ROWS = [[700, 300], [400], [90, 90, 10]]


def orders(num_lanes: int = 32, seed: int = 5, window_rows: int = 16) -> list[SampleOrder]:
    settings = {"seed": seed, "num_lanes": num_lanes, "window_rows": window_rows}
    return [SampleOrder(rows, **settings) for rows in ROWS]


def mixed(num_lanes: int = 32, weights: list[float] = WEIGHTS, seed: int = 5) -> MixedOrder:
    order = mix(orders(num_lanes, seed)[: len(weights)], weights, seed=seed)
    assert isinstance(order, MixedOrder)
    return order


@pytest.mark.parametrize(
    ("weights", "num_lanes"),
    [
        (WEIGHTS, 32),
        (WEIGHTS, 10),
        ([7, 2, 1], 1),
        ([1, 1, 1], 100),
        ([0.9899, 0.01, 0.0001], 6),
        ([0.5, 0.5], 4),
    ],
)
def test_shares_are_exact_over_any_ten_thousand_samples(
    weights: list[float], num_lanes: int
) -> None:
    order = mixed(num_lanes, weights)
    source_N, _ = order.divide(np.arange(3 * order.period + 12_345))
    for source, weight in enumerate(weights):
        before = np.concatenate(([0], np.cumsum(source_N == source)))
        shares = (before[10_000:] - before[:-10_000]) / 10_000
        assert np.abs(shares - weight / sum(weights)).max() < 0.001
        # Batches are mixed too: no long stretch is of one source.
        batches = (before[256:] - before[:-256]) / 256
        assert np.abs(batches - weight / sum(weights)).max() < 0.03


@pytest.mark.parametrize("num_lanes", [1, 4, 32])
def test_every_source_is_read_in_its_own_order(num_lanes: int) -> None:
    """Count lane by lane, as the definition says, and compare."""
    order = mixed(num_lanes)
    samples_N = np.arange(order.period * num_lanes + 5_000 if num_lanes < 9 else 60_000)
    source_N, number_N = order.divide(samples_N)
    lane_N = samples_N % num_lanes
    for lane in range(num_lanes):
        for source in range(3):
            own = number_N[(lane_N == lane) & (source_N == source)]
            np.testing.assert_array_equal(own, lane + num_lanes * np.arange(len(own)))
    for total in (0, 1, 77, order.period, len(samples_N)):
        counts = np.bincount(source_N[:total], minlength=3).tolist()
        assert order.counts(total) == counts
    # Random access gives the same, far from the start too.
    far = 10**12 + np.arange(1000)
    shuffled = np.random.default_rng(0).permutation(far)
    for found, expected in zip(order.divide(shuffled), order.divide(far), strict=True):
        np.testing.assert_array_equal(found, expected[shuffled - far[0]])


def test_the_lanes_of_a_source_keep_together() -> None:
    """Otherwise some rows would be seen much more often than others of their source."""
    order = mixed(32)
    samples_N = np.arange(400_000)
    source_N, number_N = order.divide(samples_N)
    for source, weight in enumerate(WEIGHTS):
        own = number_N[(source_N == source) & (samples_N >= 399_000)] // 32
        assert np.ptp(own) < 0.03 * weight * 400_000 / 32 + 40


def test_the_pattern_is_pinned() -> None:
    """A change of these values breaks checkpoints: raise MIXTURE_VERSION with it."""
    source_N, number_N = mixed(4).divide(np.array([0, 1, 2, 3, 4, 5, 99, 12_345, 10**9]))
    assert source_N.tolist() == [0, 1, 0, 0, 2, 0, 0, 0, 0]
    assert number_N.tolist() == [0, 1, 2, 3, 0, 1, 79, 8321, 700_030_044]


def test_one_source_has_todays_order_and_fingerprint() -> None:
    [first, *_] = orders()
    order = mix([first], [0.3], seed=5)
    assert order is first
    source_N, number_N = order.divide(np.arange(9))
    assert source_N.tolist() == [0] * 9
    assert number_N.tolist() == list(range(9))
    assert (order.counts(9), order.shares) == ([9], [1.0])
    assert data_identity(order.fingerprint()) == first.identity


def test_fingerprint_covers_data_and_weights() -> None:
    base = mixed().fingerprint()
    assert json.loads(json.dumps(base)) == base
    assert mixed(weights=[7, 2, 1]).fingerprint() == base
    other = [
        mixed(weights=[0.7, 0.21, 0.1]),
        mixed(seed=6),
        mixed(num_lanes=16),
        mix(orders(window_rows=8), WEIGHTS, seed=5),
        mix(orders()[::-1], WEIGHTS, seed=5),
    ]
    prints = [json.dumps(each.fingerprint()) for each in other]
    assert len({json.dumps(base), *prints}) == len(other) + 1
    assert data_identity(base).count("share") == 3
    assert base["data_sha256"] != other[0].fingerprint()["data_sha256"]


def test_too_small_a_weight() -> None:
    with pytest.raises(
        ConfigError, match=r"^weights\.1=1e-06 is 1e-06 of the sum of all weights; "
    ):
        mixed(weights=[1.0, 1e-6])


# --- the stream
# --------------------------------------------------------------------------------------------------

T, B = 8, 48


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Sources whose ids tell (source, row); every third row has two documents and padding."""
    folders = []
    for source, rows in enumerate((500, 200, 90)):
        folder = tmp_path_factory.mktemp("source") / str(source)
        ids_NT = np.full((rows, T), 0)
        ids_NT[:, 0], ids_NT[:, 1] = source, np.arange(rows)
        documents = [
            span
            for row in range(rows)
            for span in ([(row, 0, 3), (row, 3, 6)] if row % 3 == source else [(row, 0, T)])
        ]
        with ShardWriter(
            folder,
            sequence_length=T,
            vocab_size=5000,
            tokenizer={"name": "test", "sha256": "0" * 64},
            pad_token_id=0,
            rows_per_block=10,
            rows_per_shard=80,
        ) as writer:
            writer.write(ids_NT, np.array(documents))
        folders.append(folder)
    return folders


def stream(folders: list[Path], first_sample: int = 0, **settings: Any) -> ShardStream:
    readers = [ShardReader(folder) for folder in folders]
    order = mix(
        [reader.order(seed=3, num_lanes=6, window_rows=16) for reader in readers], WEIGHTS, seed=3
    )
    sizes = {"global_batch_size": B, "micro_batch_size": 2} | settings
    return ShardStream(readers, order, first_sample=first_sample, with_documents=True, **sizes)


def taken(steps: int, folders: list[Path], **settings: Any) -> list[Batch]:
    with stream(folders, **settings) as batches:
        size = settings.get("micro_batch_size", 2) * settings.get("world_size", 1)
        return list(islice(batches, steps * B // size))


def ids_of(batches: list[Batch]) -> np.ndarray:
    return torch.cat([batch.input_ids_BT for batch in batches]).numpy()


def test_the_stream_has_the_rows_of_the_order(folders: list[Path]) -> None:
    batches = taken(40, folders)
    readers = [ShardReader(folder) for folder in folders]
    own = [reader.order(seed=3, num_lanes=6, window_rows=16) for reader in readers]
    source_N, number_N = MixedOrder(own, WEIGHTS, seed=3).divide(np.arange(40 * B))
    ids_NT = ids_of(batches)
    np.testing.assert_array_equal(ids_NT[:, 0], source_N)
    for source, order in enumerate(own):
        at = source_N == source
        shard_N, row_N = order.locate(number_N[at])
        np.testing.assert_array_equal(ids_NT[at, 1], shard_N * 80 + row_N)
        assert at.sum() > 1.5 * order.rows_per_epoch
    for batch in batches:
        padded = batch.input_ids_BT[:, 1] % 3 == batch.input_ids_BT[:, 0]
        assert batch.segment_ids_BT is not None
        assert torch.equal(batch.segment_ids_BT[:, -1] == -1, padded)
        assert torch.equal(batch.segment_ids_BT[:, 4] == 1, padded)


def test_eight_ranks_take_the_batches_of_one(folders: list[Path]) -> None:
    steps = 12
    whole_SBT = ids_of(taken(steps, folders, micro_batch_size=B)).reshape(steps, B, T)
    for rank in range(8):
        batches = taken(
            steps, folders, rank=rank, world_size=8, micro_batch_size=1 + 2 * (rank % 2)
        )
        own = ids_of(batches).reshape(steps, B // 8, T)
        np.testing.assert_array_equal(own, whole_SBT[:, rank::8])


def test_resume_is_exact_at_every_step(folders: list[Path]) -> None:
    steps = 20
    whole_SBT = ids_of(taken(steps, folders)).reshape(steps, B, T)
    for step in range(steps):
        [batch] = taken(1, folders, first_sample=step * B, micro_batch_size=B)
        np.testing.assert_array_equal(batch.input_ids_BT.numpy(), whole_SBT[step])


def test_sources_at_urls_share_a_cache(folders: list[Path], tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    for folder in folders[:2]:
        files.put(str(folder), f"/mixture/{folder.name}", recursive=True)
    locations = ["memory://mixture/0", "memory://mixture/1", folders[2]]

    def mixed_stream(limit: int) -> ShardStream:
        cache = ShardCache(tmp_path / str(limit), limit_bytes=limit)
        readers = [ShardReader(location, cache=cache) for location in locations]
        own = [reader.order(seed=3, num_lanes=6, window_rows=16) for reader in readers]
        order = mix(own, WEIGHTS, seed=3)
        return ShardStream(readers, order, global_batch_size=B, micro_batch_size=B)

    try:
        with mixed_stream(10**6) as batches:
            found = ids_of(list(islice(batches, 20)))
        np.testing.assert_array_equal(found, ids_of(taken(20, folders)))
        sizes = [
            sorted((shard.bytes for shard in ShardReader(folder).manifest.shards), reverse=True)
            for folder in folders[:2]
        ]
        # Six lanes of either source fit, but not those of both.
        needed = sum(sum(each[:6]) for each in sizes)
        with pytest.raises(ConfigError, match=rf"is less than the {needed} bytes of the shards"):
            mixed_stream(needed - 1)
    finally:
        files.rm("/mixture", recursive=True)


def test_the_tool_checks_whether_data_sets_mix(
    folders: list[Path],
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def check(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["check_shards", *map(str, arguments)])
        return check_shards.main(), capsys.readouterr().out

    code, out = check(*folders, "--json", tmp_path / "figures.json")
    assert (code, out.count("sha256 of the data")) == (0, 3)
    names = {row["name"] for row in json.loads((tmp_path / "figures.json").read_text())}
    assert {f"shards/{folder}/rows" for folder in folders} <= names
    with pytest.raises(SystemExit, match="2"):
        check("s3://bucket/train")
    assert "expected a folder, found s3://bucket/train; check the" in capsys.readouterr().err
    code, out = check(folders[0], tiny_shards / "train")
    assert code == 3
    assert "differ in tokens per row: 8 and 16" in out
    code, out = check(folders[0], folders[1], folders[0].parent / "0")
    assert code == 0, "the same folder twice is one"
    shutil.copytree(folders[0], tmp_path / "copy")
    code, out = check(folders[0], tmp_path / "copy")
    assert code == 3
    assert "hold the same data (7 shards); leave one out" in out


def test_epochs_by_source(folders: list[Path]) -> None:
    sources = []
    for name, folder in zip("abc", folders, strict=True):
        reader = ShardReader(folder)
        sources.append(Source(name, reader, reader.order(seed=3, num_lanes=6)))
    order = mix([source.order for source in sources], WEIGHTS, seed=3)
    found = epochs(sources, order, 10_000)
    assert found == pytest.approx({"a": 7000 / 498, "b": 2000 / 198, "c": 1000 / 90}, rel=0.01)


# --- settings and runs
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tiny_shards: Path) -> list[dict[str, Any]]:
    """The tiny data sets as two sources."""
    return [
        {"name": "text", "shards": str(tiny_shards / "train"), "weight": 3.0},
        {"shards": str(tiny_shards / "validation"), "weight": 1.0},
    ]


def test_settings(tiny_config: MakeConfig, two: list[dict[str, Any]]) -> None:
    config = tiny_config(data={"train": two})
    assert {key: each.name for key, each in config.data.sources.items()} == {
        "data.train.0": "text",
        "data.train.1": "1",
    }
    assert parse_config(json.loads(config.to_json())) == config
    first, second = two
    del second["weight"]
    bad: list[tuple[Any, str]] = [
        ([first, second], r"^data\.train\.1\.weight: missing, a value is required$"),
        ([first, {**second, "weight": 0}], r"^data\.train\.1\.weight: found 0 .*; expected a numb"),
        ([{**first, "wieght": 1}], r"data\.train\.0\.wieght: unknown key; did you mean 'weight'"),
        ([first, {**first}], r"^data: train\.1 and train\.0 are both named 'text'; rename one"),
        ([{**first, "name": "a/b"}], r"train\.0\.name='a/b': use only letters"),
        ([], r"^data\.train: found \[\] \(list, 0 entries\); expected non-empty text .* or a list"),
        (
            3,
            r"^data\.train: found 3 \(int\); expected non-empty text in double quotes or a list of",
        ),
    ]
    for value, message in bad:
        with pytest.raises(ConfigError, match=message):
            tiny_config(data={"train": value})


def test_a_source_at_fault_is_named(
    tiny_config: MakeConfig, two: list[dict[str, Any]], folders: list[Path], tmp_path: Path
) -> None:
    first, second = two

    def refused(kind: type[Exception], message: str, *sources: dict[str, Any]) -> None:
        with pytest.raises(kind, match=message):
            checks.plan_run(tiny_config(data={"train": list(sources)}), 1, CPU)

    refused(DataError, r"data\.train\.1: no such folder", first, {**second, "shards": "no/where"})
    again = {**first, "name": "again"}
    refused(ConfigError, r"data\.train\.0 .* and data\.train\.1 .* the same data \(", first, again)
    tiny = {**second, "weight": 1e-9}
    refused(ConfigError, r"data\.train\.1\.weight=1e-09 is 3e-10 of the sum", first, tiny)
    other = {**second, "shards": str(folders[0])}
    refused(ConfigError, r"shards in data\.train\.1=.* have rows of 8 tokens", first, other)
    with ShardWriter(
        tmp_path / "foreign",
        sequence_length=16,
        vocab_size=100,
        tokenizer={"name": "other", "sha256": "1" * 64},
        pad_token_id=0,
    ) as writer:
        writer.write(np.zeros((40, 16), int), np.array([(row, 0, 16) for row in range(40)]))
    other = {**second, "shards": str(tmp_path / "foreign")}
    refused(DataError, r"data\.train\.1=.* was made with the tokenizer other", first, other)
    with pytest.raises(
        ConfigError, match=r"data\.train\.1: data\.num_lanes=300 is more than the \d+ rows of the"
    ):
        checks.plan_run(tiny_config(data={"train": [first, second], "num_lanes": 300}), 1, CPU)


def test_the_plan_lists_the_sources(tiny_config: MakeConfig, two: list[dict[str, Any]]) -> None:
    plan = checks.plan_run(tiny_config(data={"train": two}, train={"max_steps": 100}), 2, CPU)
    rows = [source.order.rows_per_epoch for source in plan.sources]
    counts = plan.order.counts(800)
    found = [count / own for count, own in zip(counts, rows, strict=True)]
    table = report.plan_table(plan)
    cells = [str(cell) for column in table.columns for cell in column.cells]
    assert any(f"epochs: text {found[0]:,.1f}, 1 {found[1]:,.1f}" in cell for cell in cells)
    assert any("text: 75.00% of the samples; " in cell for cell in cells)
    lines = report.start_summary(plan, "cpu", step=50, last_step=100)
    [line] = [line for line in lines if line.startswith("source text: ")]
    assert line.startswith(
        f"source text: 75.00% of the samples, {found[0]:,.1f} epochs of {rows[0]}"
    )
    assert line.endswith(two[0]["shards"])
    assert plan.sources[1].order.rows_per_lane <= 32
    assert any("source 1: data.window_rows (32)" in line for line in report.warnings_of(plan))
    single = checks.plan_run(tiny_config(), 2, CPU)
    assert plan.estimate.data_bytes == 2 * single.estimate.data_bytes


def test_a_run_on_two_sources_resumes_bit_for_bit(
    tiny_config: MakeConfig, two: list[dict[str, Any]], tmp_path: Path
) -> None:
    def run(folder: str) -> DistillConfig:
        return tiny_config(
            run={"folder": str(tmp_path / folder)},
            data={"train": two},
            train={"max_steps": 4},
            engine={"name": "fsdp"},
            checkpoint={"every_steps": 2},
        )

    whole = run("whole")
    assert distill(whole).state == "done"
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    assert [row["epoch/text"] for row in rows] == sorted(row["epoch/text"] for row in rows)
    status = json.loads((tmp_path / "whole" / "status.json").read_text())
    assert status["epochs"] == {"text": rows[-1]["epoch/text"], "1": rows[-1]["epoch/1"]}

    stopped = run("stopped")
    stop = tmp_path / "stopped" / "STOP"

    def step_and_stop(session: Any, *arguments: Any) -> Any:
        from scaledistill.training.step import train_step

        if session.step == 1:
            stop.touch()
        return train_step(session, *arguments)

    assert distill(stopped, train_step=step_and_stop).state == "stopped"
    assert distill(stopped).state == "done"
    resumed = read_rows(tmp_path / "stopped" / "metrics.jsonl")
    for before, after in zip(rows, resumed, strict=True):
        for key in ("step", "loss", "epoch/text", "epoch/1"):
            assert before[key] == after[key]
    weights = "export/l2/model.safetensors"
    assert (tmp_path / "stopped" / weights).read_bytes() == (
        tmp_path / "whole" / weights
    ).read_bytes()

    # The card names both data sets; so does that of a checkpoint.
    plan = checks.plan_run(whole, 1, CPU, writes=False)
    [exported] = export_checkpoint(whole, "newest")
    for folder in (exported, tmp_path / "whole" / "export" / "l2"):
        card = (folder / "README.md").read_text()
        assert all(source.shards.manifest.sha256 in card for source in plan.sources)

    two[1]["weight"] = 2.0
    with pytest.raises(
        ConfigError, match=r"other settings: data\.train: data_sha256 .*; data\.tra"
    ):
        checks.plan_run(run("whole"), 1, CPU)
