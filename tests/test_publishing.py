"""Exports in the formats that people deploy, and what their model cards say."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import WORDS
from huggingface_hub import EvalResult, ModelCard
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from scaledistill.cli import export as command
from scaledistill.models.card import teacher_metadata, write_metadata, write_results
from scaledistill.models.export import export_student
from scaledistill.models.student import build_student, student_config
from scaledistill.models.teacher import load_config
from scaledistill.publishing import formats, measure, onnx_model
from scaledistill.publishing import source as publishing_source
from scaledistill.publishing.request import FORMATS

SETTINGS = json.dumps({"data": {"sequence_length": 16}})
METADATA = {
    "base_model": "org/large",
    "license": "mit",
    "language": ["en", "de"],
    "datasets": ["org/texts"],
}
TEXTS = [
    " ".join(WORDS[i * 7 % 60 : i * 7 % 60 + 1 + i * 5 % 23]) for i in range(20)
]  # 1 to 23 words


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROUNDS", 1)
    monkeypatch.setattr(measure, "ROUND_SECONDS", 0.0)


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Callable[..., Path]:
    """Return a function that writes the export of a student of some layers."""

    def write(num_layers: int = 2, tap: str | None = "last", **more: Any) -> Path:
        config = student_config(
            load_config(tiny_teacher), num_layers=num_layers, hidden_size=16, num_attention_heads=2
        )
        config.initializer_range = 0.2
        student = build_student(None, config, seed=3)
        return export_student(
            tmp_path_factory.mktemp("export") / "small",
            student.config,
            student.state_dict(),
            tap=tap,
            card={"teacher": "`org/large`, layer 3", "init": "random"},
            **{
                "metadata": METADATA,
                "settings": SETTINGS,
                "tokenizer_source": tiny_teacher,
                **more,
            },
        )

    return write


def means(folder: Path, layer: int, texts: list[str], num_tokens: int) -> Tensor:
    """Return what plain transformers gives, one text at a time, without padding."""
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=num_tokens, return_tensors="pt")
        with torch.no_grad():
            found = model(input_ids=inputs["input_ids"], output_hidden_states=True)
        rows.append(found.hidden_states[layer].mean(1))
    return torch.cat(rows)


def run(*arguments: object) -> int:
    return command.main([str(argument) for argument in arguments])


def test_all_formats_of_a_student(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One export, since PyTorch's exporter takes seconds. The last layer's output is untrained."""
    for package in ("onnx", "onnxscript", "onnxruntime", "sentence_transformers"):
        pytest.importorskip(package)
    import onnxruntime
    from sentence_transformers import SentenceTransformer

    source, output, sample = write(), tmp_path / "out" / "l2", tmp_path / "sample.txt"
    sample.write_text("\n".join(TEXTS))
    wanted = [part for name in FORMATS for part in ("--format", name)]
    assert run(source, *wanted, "--output", output, "--sample", sample) == 0
    assert [path.name for path in output.parent.iterdir()] == ["l2"]

    # transformers: the whole student.
    own, written = load_file(source / "model.safetensors"), load_file(output / "model.safetensors")
    assert own.keys() == written.keys()
    assert all(torch.equal(own[name], written[name]) for name in own)

    # sentence-transformers: means after the last trained layer, of at most 16 tokens.
    expected = means(source, 1, TEXTS, 16)
    model = SentenceTransformer(str(output), device="cpu")
    assert model.max_seq_length == 16
    found = model.encode(TEXTS, convert_to_tensor=True, batch_size=7)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    # ONNX: the same vectors, with any batch and length.
    tokenizer = AutoTokenizer.from_pretrained(output)
    vectors = {}
    for file in ("model.onnx", "model_int8.onnx"):
        session = onnxruntime.InferenceSession(output / "onnx" / file)
        parts = []
        for first in range(0, len(TEXTS), 9):
            inputs = tokenizer(
                TEXTS[first : first + 9],
                padding=True,
                truncation=True,
                max_length=16,
                return_tensors="np",
            )
            names = ("input_ids", "attention_mask")
            _, vector = session.run(None, {name: inputs[name] for name in names})
            parts.append(torch.from_numpy(vector))
        vectors[file] = torch.cat(parts)
    torch.testing.assert_close(vectors["model.onnx"], expected, rtol=0, atol=1e-5)
    assert 0 < float((vectors["model_int8.onnx"] - expected).abs().max()) < 0.2
    figures = {row["name"]: row for row in json.loads((output / "export.json").read_text())}
    assert 0 <= figures["onnx/largest difference"]["value"] < measure.TOLERANCE
    assert figures["onnx/largest difference"]["n"] == len(TEXTS)
    assert figures["onnx-int8/latency/batch-32"]["value"] > 0
    assert figures["onnx-int8/bytes"]["value"] == (output / "onnx/model_int8.onnx").stat().st_size
    assert "onnx-int8" in capsys.readouterr().out

    card = ModelCard.load(output / "README.md")
    assert card.data.library_name == "sentence-transformers"
    assert {"sentence-transformers", "onnx", "distillation"} <= set(card.data.tags)
    assert "in block 1, the last one that was trained" in card.text
    assert "| onnx-int8 | " in card.text
    assert card.text.count("## Use\n") == card.text.count("## Licence\n") == 1

    # An older export is replaced on request only, and never half.
    before = (output / "README.md").read_bytes()
    assert run(source, "--output", output) == 2
    assert "exists; name another folder, or replace it with --force" in capsys.readouterr().err
    assert (output / "README.md").read_bytes() == before
    assert run(source, "--output", output, "--force") == 0
    assert not (output / "onnx").exists()
    assert [path.name for path in output.parent.iterdir()] == ["l2"]


def test_an_export_forgets_what_the_older_one_had(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    source = write()
    write_metadata(
        source,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["distillation", "sentence-transformers", "onnx"],
    )
    assert run(source, "--output", tmp_path / "out") == 0
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "feature-extraction")
    assert data.tags == ["distillation"]


def test_the_second_file_of_large_models(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.touch()
    assert onnx_model.onnx_files(path) == [path]
    (tmp_path / "model.onnx.data").touch()
    assert onnx_model.onnx_files(path) == [path, tmp_path / "model.onnx.data"]


def test_random_inputs_are_not_as_long_as_long_models_allow() -> None:
    lengths = [ids_BT.shape[1] for ids_BT, _ in measure._random_batches(40_960, 100)]
    assert max(lengths) == 512


def test_a_tokenizer_without_a_padding_token(
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("sentence_transformers")
    source, sample = write(), tmp_path / "sample.txt"
    settings = json.loads((source / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    sample.write_text("\n".join(TEXTS))
    assert run(source, "--sample", sample, "--output", tmp_path / "plain") == 0
    wanted = ("--format", "sentence-transformers", "--output", tmp_path / "sentences")
    assert run(source, *wanted) == 3
    assert (
        f"SOURCE='{source}' has no padding token, which sentence-transformers needs; set pad_token"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "sentences").exists()
    monkeypatch.setattr(formats, "check_formats", lambda names: None)
    assert run(source, "--format", "onnx", "--output", tmp_path / "onnx") == 3
    assert "has no padding token, which onnx needs" in capsys.readouterr().err


def test_another_licence_leaves_nothing_of_the_teacher_s(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    named = {"license": "other", "license_name": "theirs", "license_link": "https://x.org"}
    source = write(metadata=named)
    for folder, arguments in ("same", ()), ("own", ("--licence", "mit")):
        assert run(source, *arguments, "--output", tmp_path / folder) == 0
    data = ModelCard.load(tmp_path / "same" / "README.md").data.to_dict()
    assert {key: data[key] for key in named} == named
    data = ModelCard.load(tmp_path / "own" / "README.md").data.to_dict()
    assert (data["license"], "license_name" in data, "license_link" in data) == ("mit", 0, 0)


def test_a_student_without_a_trained_layer_is_not_cut(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("sentence_transformers")
    output = tmp_path / "l1"
    assert run(write(1), "--format", "sentence-transformers", "--output", output) == 0
    assert (
        "The student has one block, whose output the training did not reach"
        in (output / "README.md").read_text()
    )


def test_one_format_of_a_student_that_is_cut(
    write: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The card is about the cut model, so results of the whole one are not on it."""
    pytest.importorskip("sentence_transformers")
    caplog.set_level(logging.INFO)
    source, output = write(), tmp_path / "l2"
    write_results(source, "small", [result()])
    assert ModelCard.load(source / "README.md").data.eval_results == [result()]
    assert run(source, "--format", "sentence-transformers", "--output", output) == 0
    card = ModelCard.load(output / "README.md")
    assert "| layers | the first 1 of the student's 2 |" in card.text
    assert "vectors are those of block 1, the last one that was trained; --num-layers 2" in (
        caplog.text
    )
    caplog.clear()
    assert "None: the loss was taken from" in card.text
    assert card.data.eval_results is None
    assert AutoModel.from_pretrained(output).config.num_hidden_layers == 1
    assert run(source, "--format", "sentence-transformers", "--num-layers", 2, "--output",
               tmp_path / "stated") == 0  # fmt: skip
    assert "vectors are those of block" not in caplog.text
    assert AutoModel.from_pretrained(tmp_path / "stated").config.num_hidden_layers == 2
    # Exported again, it is not cut again, and what is not cut keeps its results.
    assert run(output, "--format", "sentence-transformers", "--output", tmp_path / "again") == 0
    assert AutoModel.from_pretrained(tmp_path / "again").config.num_hidden_layers == 1
    assert run(source, "--output", tmp_path / "whole") == 0
    assert ModelCard.load(tmp_path / "whole" / "README.md").data.eval_results == [result()]


def test_scores_of_the_whole_student_are_not_those_of_a_cut_one(
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(formats, "check_formats", lambda names: None)
    source = write()
    parameters = sum(value.numel() for value in load_file(source / "model.safetensors").values())
    row = SimpleNamespace(parameters=parameters)
    monkeypatch.setattr(formats, "scored_row", lambda name, folder: row)
    for more in (("--format", "sentence-transformers"), ("--num-layers", 1)):
        assert run(source, *more, "--glue", "scores", "--output", tmp_path / "out") == 2
        assert (
            "--glue 'scores' has no scores of the first 1 of 2 layers, as the export has them; "
            "leave it out"
        ) in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert run(source, "--num-layers", 1, "--output", tmp_path / "l1") == 0
    cut = load_file(tmp_path / "l1" / "model.safetensors")
    row.parameters = sum(value.numel() for value in cut.values())
    monkeypatch.setattr(formats, "write_scores", lambda export, name, output: None)
    scored = (*more, "--glue", "scores", "--glue-model", "l1")
    assert run(source, *scored, "--output", tmp_path / "scored") == 0
    # The layers of an ALBERT share their parameters.
    monkeypatch.setattr(formats, "architecture_of", lambda config: SimpleNamespace(repeats_block=1))
    assert run(source, *scored, "--output", tmp_path / "albert") == 2


@pytest.mark.filterwarnings("ignore:Importing from 'sentence_transformers:DeprecationWarning")
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_modules_of_a_sentence_transformers_model(
    pooling: str, write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    encoder = Transformer(str(write(tap=None)), max_seq_length=6)
    whole = [encoder, Pooling(16, pooling_mode=pooling, include_prompt=False), Normalize()]
    source, output = tmp_path / "source", tmp_path / "out"
    SentenceTransformer(
        modules=whole,
        device="cpu",
        prompts={"query": f"{WORDS[3]} {WORDS[4]}: ", "passage": WORDS[5]},
        default_prompt_name="query",
        similarity_fn_name="dot",
    ).save(str(source))
    # As versions before 6 have stored it.
    limits = {"max_seq_length": 6, "do_lower_case": True}
    (source / "sentence_bert_config.json").write_text(json.dumps(limits))
    code = run(source, "--format", "sentence-transformers", "--output", output)
    if pooling == "cls":
        assert code == 2
        assert (
            "--format 'sentence-transformers' takes the mean of the hidden states, but the model's "
            "modules.json says 'cls'; leave it out"
        ) in capsys.readouterr().err
        assert run(source, "--output", output) == 0
        return
    assert code == 0
    models = [SentenceTransformer(str(folder), device="cpu") for folder in (source, output)]
    texts = [text.upper() for text in TEXTS]
    torch.testing.assert_close(models[0].encode(texts), models[0].encode(TEXTS))
    for options in ({}, {"prompt_name": "passage"}, {"prompt": ""}):
        expected, found = (torch.from_numpy(model.encode(texts, **options)) for model in models)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert models[1].similarity_fn_name == "dot"
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(TEXTS)))
    assert models[1].max_seq_length == 6
    again = publishing_source.open_student(output)
    assert again.num_tokens == 6
    assert again.sentence.settings["prompts"]["passage"] == WORDS[5]
    kept = publishing_source.open_student(source).sentence
    assert kept.lowercases
    assert again.sentence == kept
    assert "with length 1. Texts are truncated at 6 tokens" in (output / "README.md").read_text()


def test_lowercasing_that_onnx_has_not(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    source = write(tap=None)
    (source / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    assert run(source, "--format", "onnx", "--output", tmp_path / "out") == 2
    assert (
        "--format 'onnx' does not lowercase texts, as the model's sentence_bert_config.json asks; "
        "leave it out" in capsys.readouterr().err
    )


def test_pooling_of_older_and_newer_versions() -> None:
    for config, pooling in (
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["cls", "mean"]}, "cls + mean"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "mean + cls"),
        ({}, "mean"),
    ):
        assert publishing_source._pooling(config) == pooling


def test_large_outputs_may_differ_by_more() -> None:
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)
    hidden = torch.full((2, 3, 4), 120.0)

    def form(apart: float) -> measure.Form:
        return lambda ids_BT, mask_BT: (hidden + apart, hidden.mean(1) + apart)

    found = measure.compare({"onnx": form(1e-3)}, form(0.0), [(ids, mask)])["onnx"]
    assert found.largest == pytest.approx(1e-3, rel=0.1)
    assert found.allowed == pytest.approx(120 * measure.TOLERANCE)


def test_norwegian_is_no_boolean(tmp_path: Path) -> None:
    for languages, expected in (("[en, no]", ["en", "no"]), ("no", "no")):
        (tmp_path / "README.md").write_text(f"---\nlanguage: {languages}\n---\n# x")
        assert teacher_metadata("org/large", tmp_path)["language"] == expected
        write_metadata(tmp_path, license="mit")
        assert ModelCard.load(tmp_path / "README.md").data["language"] == expected


def test_special_tokens_as_transformers_4_reads_them(
    write: Callable[..., Path], tiny_teacher: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    tokenizer.add_special_tokens({"extra_special_tokens": [WORDS[3], WORDS[5]]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    shutil.copy(tiny_teacher / "config.json", tmp_path / "tokenizer")
    folder = write(tokenizer_source=tmp_path / "tokenizer")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["additional_special_tokens"] == [WORDS[3], WORDS[5]]
    assert "extra_special_tokens" not in settings
    read = AutoTokenizer.from_pretrained(folder)
    assert read.all_special_tokens == tokenizer.all_special_tokens


def test_an_output_whose_name_is_not_utf_8(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(write(), "--output", tmp_path / os.fsdecode(b"l2\xff")) == 2
    assert f"--output '{tmp_path}/l2\ufffd' is not UTF-8; name" in capsys.readouterr().err


def result() -> EvalResult:
    return EvalResult(
        task_type="text-classification",
        dataset_type="nyu-mll/glue",
        dataset_name="GLUE RTE",
        dataset_config="rte",
        dataset_split="validation",
        metric_type="accuracy",
        metric_name="RTE accuracy, %, median of 3 seeds",
        metric_value=66.4,
    )


def test_the_card_is_read_by_the_hub(write: Callable[..., Path]) -> None:
    folder = write()
    write_results(folder, "small", [result()])
    data = ModelCard.load(folder / "README.md").data
    assert {key: data[key] for key in METADATA} == METADATA
    assert data["base_model_relation"] == "finetune"
    assert (data.library_name, data.pipeline_tag) == ("transformers", "feature-extraction")
    assert data.tags == ["distillation", "minilmv2", "scaledistill"]
    [entry] = data.to_dict()["model-index"]
    assert entry["name"] == "small"
    assert entry["results"][0]["metrics"][0]["value"] == 66.4
    text = (folder / "README.md").read_text()
    assert "mit. Check that the licences of the teacher" in text
    [sentence] = [line for line in text.splitlines() if "got no gradient" in line]
    assert "0.0 M, got no gradient and hold their random initialisation" in sentence
    assert (folder / "distill.json").read_text() == SETTINGS


def test_what_a_card_takes_from_the_teacher(tmp_path: Path) -> None:
    cached = tmp_path / "models--org--large" / "snapshots" / ("0" * 40)
    cached.mkdir(parents=True)
    assert teacher_metadata(str(cached), None) == {"base_model": "org/large"}
    (cached / "README.md").write_text("---\nlicense: mit\nlanguage: en\nbase_model: a/b\n---\n# x")
    assert teacher_metadata("org/large", cached) == {
        "base_model": "org/large",
        "license": "mit",
        "language": "en",
    }
    (cached / "README.md").write_text("---\nlicense: [\n---\n")
    assert teacher_metadata("org/large", cached) == {"base_model": "org/large"}
    assert teacher_metadata(str(tmp_path), None) == {}


def test_what_cannot_be_exported(
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, output = write(), tmp_path / "out"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").touch()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    old = write(metadata={})
    (old / "scaledistill.json").unlink()
    for arguments, code, message in (
        ([source, "--format", "onxn"], 2, "--format 'onxn' is unknown; did you mean onnx?"),
        ([tmp_path / "no"], 3, ": no such folder; "),
        ([tmp_path / "run"], 3, "is a run without checkpoints"),
        ([tmp_path / "mine"], 3, "has no config.json"),
        ([old], 3, "is an export without scaledistill.json, so what of it was trained is not"),
        ([source, "--student", "l2"], 2, "--student 'l2' is read only for runs and checkpoints"),
        ([source, "--step", 7], 2, "--step 7 is read only for runs; leave it out"),
        ([source, "--num-layers", 3], 2, "--num-layers 3: the model has 2 layers; use 1 to 2"),
        ([source, "--sample", tmp_path / "no"], 3, "cannot be read ("),
        ([source, "--glue", tmp_path], 3, "has no grid.json"),
    ):
        assert run(*arguments, "--output", output) == code
        assert message in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "run"]
    with pytest.raises(SystemExit):
        run(source, "--glue-model", "l2", "--output", output)
    assert "--glue-model is read only with --glue" in capsys.readouterr().err
    assert run(source, "--output", tmp_path / "mine", "--force") == 2
    assert "has no scaledistill.json, so it is not an export and --force" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis").exists()

    spec = importlib.util.find_spec
    hidden = ("onnxscript", "onnxruntime")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in hidden else spec(name)
    )
    assert run(source, "--format", "onnx", "--output", output) == 2
    assert (
        "--format onnx needs onnxscript and onnxruntime, which are not installed; "
        "pip install 'scaledistill[export]'"
    ) in capsys.readouterr().err


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_an_onnx_model_that_differs_is_not_exported(
    value: float,
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Wrong:
        def __init__(self, path: Path) -> None:
            """Ignore the file."""

        def __call__(self, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
            return torch.zeros(*ids_BT.shape, 16), torch.full((len(ids_BT), 16), value)

    def no_export(encoder: object, path: Path, *, normalizes: bool) -> None:
        path.touch()

    monkeypatch.setattr(formats, "check_formats", lambda names: None)
    monkeypatch.setattr(formats, "OnnxEncoder", Wrong)
    monkeypatch.setattr(formats, "write_onnx", no_export)
    assert run(write(), "--format", "onnx", "--output", tmp_path / "out") == 3
    assert "the onnx model differs from PyTorch by " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_int8_model_that_gives_nan_is_not_exported(
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reference: list[Any] = []

    class Same:
        def __init__(self, path: Path) -> None:
            self.value = math.nan if "int8" in path.name else 0.0

        def __call__(self, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                hidden, mean = reference[0](ids_BT, mask_BT)
            return hidden + self.value, mean

    def no_export(encoder: Any, path: Path, *, normalizes: bool) -> None:
        reference.append(formats.SentenceEncoder(encoder).eval())
        path.touch()

    monkeypatch.setattr(formats, "check_formats", lambda names: None)
    monkeypatch.setattr(formats, "OnnxEncoder", Same)
    monkeypatch.setattr(formats, "write_onnx", no_export)
    monkeypatch.setattr(formats, "quantize", lambda source, target: target.touch())
    assert run(write(), "--format", "onnx-int8", "--output", tmp_path / "out") == 3
    assert "the onnx-int8 model differs from PyTorch by nan" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_model_that_torch_cannot_export(
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def cannot(*_: object, **__: object) -> None:
        raise NotImplementedError("no such operator\nand a long trace")

    monkeypatch.setattr(formats, "check_formats", lambda names: None)
    monkeypatch.setattr(torch.onnx, "export", cannot)
    assert run(write(), "--format", "onnx", "--output", tmp_path / "out") == 2
    assert (
        "--format: torch.onnx cannot export models of type 'bert' (no such operator); leave onnx"
    ) in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
