"""The tables of docs/quality.md from the figures of runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from scaledistill.errors import DataError
from scaledistill.glue.summary import Row, Score, Summary

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import quality
import quality_report

COLUMN = "rte/accuracy"


def row(name: str, values: list[float]) -> Row:
    score = Score.of(values)
    return Row(name, None, {COLUMN: score}, average=score.median)


def test_a_difference_counts_where_the_seeds_are_apart() -> None:
    theirs = row("theirs", [50.0, 52.0, 51.0])
    assert quality_report.difference(row("ours", [53.0, 52.5, 60.0]), theirs, COLUMN) == "**+2.0**"
    assert quality_report.difference(row("ours", [53.0, 52.0, 60.0]), theirs, COLUMN) == "+2.0"
    assert quality_report.difference(row("ours", [40.0, 49.9, 41.0]), theirs, COLUMN) == "**−10.0**"


def test_shares_of_the_teacher() -> None:
    rows = [row("teacher", [80.0]), row("teacher-init", [72.0]), row("teacher-init-undistilled", [60.0])]
    table = quality_report.comparison(Summary([COLUMN], [COLUMN], rows, [], [], []))
    assert table.rows[0] == ["teacher-init against teacher-init-undistilled", "**+12.0**", "+12.0", ""]
    assert [line[-1] for line in table.rows[1:]] == ["100.0%", "90.0%", "75.0%"]


def test_the_tables_go_between_their_marks(tmp_path: Path) -> None:
    document = tmp_path / "quality.md"
    document.write_text("before\n\n<!-- ablations -->\nold\n<!-- end ablations -->\n\nafter\n")
    losses = {
        **{f"short/base-seed{seed}": {"12": 0.2, "48": loss} for seed, loss in enumerate((0.100, 0.101, 0.099), 1)},
        **{f"short/random-seed{seed}": {"12": 0.2, "48": loss} for seed, loss in enumerate((0.150, 0.151, 0.149), 1)},
        **{f"short/dropout-0.1-seed{seed}": {"12": 0.2, "48": loss} for seed, loss in enumerate((0.1, 0.11, 0.1), 1)},
        "long/base-seed1": {"12": 0.0, "48": 0.0},
    }
    (tmp_path / "yardsticks.json").write_text(json.dumps(losses))
    variants, heads = ["base", "random", "heads-12", "dropout-0.1"], [12, 48]
    assert quality_report.write_report(tmp_path, document, variants, heads) == ["ablations"]
    text = document.read_text()
    assert text.startswith("before\n\n<!-- ablations -->\n\n")
    assert text.endswith("\n\n<!-- end ablations -->\n\nafter\n")
    assert "old" not in text
    assert "| base | 3 | 0.2000 (0.2000–0.2000) | 0.1000 (0.0990–0.1010) | – |" in text
    assert "| random | 3 | 0.2000 (0.2000–0.2000) | 0.1500 (0.1490–0.1510) | +50.0%, p = " in text
    [dropout] = [line for line in text.splitlines() if line.startswith("| dropout-0.1 |")]
    assert dropout.endswith("(not significant) |")
    assert (tmp_path / "quality" / "ablations.png").stat().st_size > 5000
    assert quality_report.write_report(tmp_path, document, variants, heads) == ["ablations"]
    assert document.read_text() == text
    document.write_text("no marks")
    with pytest.raises(DataError, match="has 0 marks for the table 'ablations'"):
        quality_report.write_report(tmp_path, document, variants, heads)


def test_a_report_on_unfinished_work_says_what_there_is(tmp_path: Path) -> None:
    document = tmp_path / "quality.md"
    document.write_text("<!-- ablations -->\n<!-- end ablations -->\n")
    (tmp_path / "yardsticks.json").write_text(json.dumps({"long/base-seed1": {"12": 0.2, "48": 0.1}}))
    assert quality_report.write_report(tmp_path, document, ["base"], [12, 48]) == []
    rows = [Row(f"base-seed{seed}", None, {}, average=None) for seed in (1, 2)]
    table = quality_report.tap_table(Summary([COLUMN], [], rows, [], [], []))
    assert (table.columns, table.rows) == (["variant", "n"], [["base", "2"]])


def test_a_run_is_done_only_with_the_same_settings(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"state": "done"}))
    tree = quality.settings()
    tree["train"] |= {"max_steps": 7, "precision": "fp32"}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert quality.is_done(tmp_path, {"train.max_steps": 7})
    assert not quality.is_done(tmp_path, {"train.max_steps": 8})
    assert not quality.is_done(tmp_path, {"train.max_steps": 7, "students.l3-h384.relation_heads": 12})
    tree["relations"]["num_heads"] = 24
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert not quality.is_done(tmp_path, {"train.max_steps": 7})
