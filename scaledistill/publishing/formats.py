"""Write a student in the formats that people deploy, with measurements in its model card.

Inputs: a `Student`. Outputs: one folder, which appears whole or not at all:

    config.json, model.safetensors, tokenizer, README.md   transformers
    modules.json, 1_Pooling/                               sentence-transformers
    onnx/model.onnx, onnx/model_int8.onnx                  onnx, onnx-int8
    export.json                                            what was measured, as figures

Not handled here: reading the student (`publishing.source`), uploading (`publishing.hub`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult
from safetensors import SafetensorError
from torch import Tensor

from scaledistill.data.tokenizer import load_tokenizer
from scaledistill.errors import DataError, SettingError, SourceError
from scaledistill.glue.card import scored_row, write_scores
from scaledistill.metrics.benchmark import Report, Table, machine_facts
from scaledistill.models.architectures import architecture_of
from scaledistill.models.card import (
    README,
    card_section,
    licence_text,
    read_card,
    restate,
    use_text,
    write_card_section,
    write_metadata,
    write_results,
)
from scaledistill.models.export import exchange, export_student
from scaledistill.models.teacher import quiet_transformers
from scaledistill.publishing import measure
from scaledistill.publishing.onnx_model import (
    OnnxEncoder,
    SentenceEncoder,
    onnx_files,
    quantize,
    write_onnx,
)
from scaledistill.publishing.request import SENTENCE, Options, check_formats, check_output
from scaledistill.publishing.source import SENTENCE_SETTINGS, Student
from scaledistill.storage.files import disk_remedy, sync, write_bytes, write_json

log = logging.getLogger(__name__)

SENTENCE_TASK = "sentence-similarity"
FIGURES = "export.json"
MODULE = "0_Transformer"
SAME = 1e-6
"""The largest difference of `SentenceTransformer.encode` from the mean of the hidden states."""
SENTENCE_USE = """\
```python
from sentence_transformers import SentenceTransformer

vectors = SentenceTransformer("{name}").encode(["some text", "another"])
```

Vectors are the mean of the hidden states of a text's tokens{cut}{normal}. Texts are truncated at \
{num_tokens} tokens."""
ONNX_USE = """\
```python
from onnxruntime import InferenceSession
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
texts = tokenizer(
    ["some text", "another"], padding=True, truncation=True, max_length={num_tokens},
    return_tensors="np",
)
names = ("input_ids", "attention_mask")
session = InferenceSession("{name}/onnx/{file}")
hidden, vectors = session.run(None, {{name: texts[name] for name in names}})
```

The outputs are the hidden states, [batch, tokens, width], and their means over each text's \
tokens{cut}{normal}."""
NOT_CUT = (
    "The student has one block, whose output the training did not reach, and no block below it "
    "to take vectors from: they come from that block as it was initialised. Fine-tune it first."
)


def write_formats(
    student: Student, output: Path, options: Options, *, force: bool = False
) -> Report:
    """Write a student's formats into `output` and return what was measured.

    Raises:
        SettingError: a format is unknown or cannot be written for this architecture, a package is
            missing, or `output` exists.
        DataError: the model, the data or the disk cannot be used, or a format computes something
            else than PyTorch.
    """
    check_formats(options.formats)
    check_output(output, force=force)
    num_layers = student.config.num_hidden_layers
    if options.num_layers is not None:
        student = student.cut(options.num_layers)
    given = {"base_model": options.base_model, "license": options.licence}
    stated = {key: value for key, value in given.items() if value}
    scored = None
    if options.glue is not None:
        scored = scored_row(options.glue_model or student.name, options.glue).parameters
    metadata = dict(student.metadata)
    restate(metadata, **stated)
    student = replace(student, metadata=metadata)
    target = Path(os.path.realpath(output))
    work = target.with_name(f".{target.name}.partial")
    writer = _Writer(student, work / target.name, options)
    written = writer.main.config.num_hidden_layers
    # Of ALBERT, whose layers share their parameters, the number of these does not tell.
    tells = not architecture_of(student.config).repeats_block
    is_scored = written == num_layers or (tells and scored == writer.num_parameters)
    if options.glue is not None and not is_scored:
        raise SettingError(
            "glue",
            str(options.glue),
            f"has no scores of the first {written} of {num_layers} layers, as the export has them",
            "leave it out, or, without --num-layers, export the form transformers too; an export "
            "of these layers can be scored by itself",
        )
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        report = writer.write()
        check_output(output, force=force)
        for path in sorted(work.rglob("*"), reverse=True):
            sync(path)
        exchange(work / target.name, target)
        sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{output}: the export could not be written: {error}; {disk_remedy(error)}"
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return report


class _Writer:
    """Writes one export into a folder that nobody else sees."""

    def __init__(self, student: Student, folder: Path, options: Options) -> None:
        self.whole, self.folder, self.options = student, folder, options
        self.report = Report()
        self.deployed = [name for name in options.formats if name != "transformers"]
        # By default, what is deployed without fine-tuning does not end in a block whose output was
        # never trained.
        is_stated = options.num_layers is not None
        can_cut = not is_stated and 0 < student.trained_layers < student.config.num_hidden_layers
        self.pooled = student.cut(student.trained_layers) if self.deployed and can_cut else student
        self.not_cut = student.trained_layers == 0 and bool(self.deployed)
        self.main = student if "transformers" in options.formats else self.pooled

    @property
    def num_parameters(self) -> int:
        """The number of parameters of the transformers model."""
        return sum(value.numel() for value in self.main.state.values())

    @property
    def is_cut(self) -> bool:
        """Whether the vectors come from a block below the student's last."""
        return self.pooled is not self.whole

    def write(self) -> Report:
        formats, options = self.options.formats, self.options
        if self.deployed:
            self._check_vectors()
        below, last = (one.config.num_hidden_layers for one in (self.pooled, self.whole))
        if below < last:
            better = self.whole.card.get("init") == "teacher"
            log.info(
                "vectors are those of block %d, the last one that was trained; --num-layers %d "
                "takes those of block %d%s",
                *(below, last, last),
                ", which may be better, because it is the teacher's" if better else "",
            )
        self._write_model(self.folder, self.main)
        readme = self.main.readme
        if readme is None and self.main.tap is None:  # not a student of ours, and without a card
            readme = f"# {self.folder.name}\n\n## Licence\n\n{licence_text(None)}\n"
        if readme is not None:
            write_bytes(self.folder / README, readme.encode())
        fields = {key: self.main.metadata.get(key) for key in ("license", "base_model")}
        known = {key: value for key, value in fields.items() if value}
        write_metadata(self.folder, **known, **_without_formats(self.folder))
        encoder = self.pooled.encoder()
        reference = SentenceEncoder(encoder, normalizes=self.pooled.sentence.normalizes).eval()

        @torch.inference_mode()
        def run(ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
            hidden, mean = reference(ids_BT, mask_BT)
            return hidden, mean

        forms: dict[str, measure.Form] = {"pytorch": run}
        files = {"pytorch": self.folder / "model.safetensors"}
        if SENTENCE in formats:
            files["pytorch"] = self._write_sentence() / "model.safetensors"
        onnx = self.folder / "onnx"
        if {"onnx", "onnx-int8"} & set(formats):
            onnx.mkdir()
            self.pooled.config.save_pretrained(onnx)
            files["onnx"] = onnx / "model.onnx"
            log.info("writing the ONNX model")
            write_onnx(encoder, files["onnx"], normalizes=self.pooled.sentence.normalizes)
            forms["onnx"] = OnnxEncoder(files["onnx"])
        if "onnx-int8" in formats:
            files["onnx-int8"] = onnx / "model_int8.onnx"
            quantize(files["onnx"], files["onnx-int8"])
            forms["onnx-int8"] = OnnxEncoder(files["onnx-int8"])
        table = self._measure(forms, files)
        if SENTENCE in formats:
            self._check_sentence(run)
        if "onnx" not in formats and "onnx" in files:
            del forms["onnx"]
            for part in onnx_files(files["onnx"]):
                part.unlink()
        if not {"transformers", SENTENCE} & set(formats):
            (self.folder / "model.safetensors").unlink()
        self._write_card(table)
        if options.glue is not None:
            write_scores(self.folder, options.glue_model or self.whole.name, options.glue)
        return self.report

    def _write_model(self, folder: Path, student: Student) -> None:
        export_student(
            folder,
            student.config,
            student.state,
            tap=student.tap,
            tokenizer_source=student.tokenizer,
            revision=student.revision,
            card=student.card,
            metadata=student.metadata,
            settings=student.settings,
        )

    def _check_vectors(self) -> None:
        """Check that the forms with vectors can give those of the student's texts.

        Raises:
            SettingError: they are others than means, or of texts that are lowercased first.
            SourceError: the tokenizer has no padding token.
        """
        form, sentence = self.deployed[0], self.pooled.sentence
        if sentence.pooling != "mean":
            raise SettingError(
                "formats",
                form,
                "takes the mean of the hidden states, but the model's modules.json says "
                f"{sentence.pooling!r}",
                "leave it out: the form transformers has no vectors",
            )
        onnx = [name for name in self.deployed if name != SENTENCE]
        if sentence.lowercases and onnx:
            raise SettingError(
                "formats",
                onnx[0],
                "does not lowercase texts, as the model's sentence_bert_config.json asks",
                "leave it out",
            )
        tokenizer = self.pooled.tokenizer
        if load_tokenizer(tokenizer, self.pooled.revision).pad_token is None:
            raise SourceError(
                "tokenizer_source",
                tokenizer,
                f"has no padding token, which {form} needs",
                "set pad_token in its tokenizer_config.json",
            )

    def _write_sentence(self) -> Path:
        """Write what `SentenceTransformer` reads; return the folder of its model."""
        place, module, sentence = "", self.folder, self.pooled.sentence
        if self.pooled is not self.main:
            place, module = MODULE, self.folder / MODULE
            self._write_model(module, self.pooled)
            for name in (README, "distill.json"):
                (module / name).unlink(missing_ok=True)
        # The class names of versions 2 to 5, which later ones still read.
        modules = [("Transformer", place), ("Pooling", "1_Pooling")]
        if sentence.normalizes:
            modules.append(("Normalize", "2_Normalize"))
        content = [
            {
                "idx": number,
                "name": str(number),
                "path": path,
                "type": f"sentence_transformers.models.{kind}",
            }
            for number, (kind, path) in enumerate(modules)
        ]
        write_bytes(self.folder / "modules.json", (json.dumps(content, indent=2) + "\n").encode())
        limits = {"max_seq_length": self.pooled.num_tokens, "do_lower_case": sentence.lowercases}
        write_json(module / "sentence_bert_config.json", limits)
        (self.folder / "1_Pooling").mkdir()
        modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
        pooling = {
            "word_embedding_dimension": self.pooled.config.hidden_size,
            **{f"pooling_mode_{mode}": mode == "mean_tokens" for mode in modes},
        }
        if not sentence.includes_prompt:  # versions before 2.4 do not know this key
            pooling["include_prompt"] = False
        write_json(self.folder / "1_Pooling" / "config.json", pooling)
        if sentence.settings:
            write_json(self.folder / SENTENCE_SETTINGS, dict(sentence.settings))
        return module

    def _check_sentence(self, reference: measure.Form) -> None:
        """Load the folder with sentence-transformers and compare its vectors.

        Raises:
            DataError: they differ.
        """
        from sentence_transformers import SentenceTransformer

        with quiet_transformers():
            model = SentenceTransformer(str(self.folder), device="cpu", local_files_only=True)
        texts = ["a Text", "another, longer text about something else", "!"]
        tokenizer = load_tokenizer(self.folder)
        inputs = tokenizer(
            [text.lower() for text in texts] if self.pooled.sentence.lowercases else texts,
            padding=True,
            truncation=True,
            max_length=self.pooled.num_tokens,
            return_tensors="pt",
        )
        expected = reference(inputs["input_ids"], inputs["attention_mask"])[1]
        found = model.encode(texts, prompt="", convert_to_tensor=True, show_progress_bar=False)
        largest = float((found - expected).abs().max())
        if not largest <= SAME * max(1.0, float(expected.abs().max())):
            raise DataError(
                f"SentenceTransformer gives other vectors than the student (they differ by "
                f"{largest:.1e}, expected at most {SAME}); please report it with the versions of "
                "sentence-transformers and transformers"
            )
        self.report.add("sentence-transformers/largest difference", largest, "absolute")

    def _measure(self, forms: dict[str, measure.Form], files: dict[str, Path]) -> Table:
        """Compare and time the forms; return the table for the card.

        Raises:
            DataError: ONNX computes something else than PyTorch.
        """
        student, options, report = self.pooled, self.options, self.report
        tokenizer = load_tokenizer(student.tokenizer, student.revision)
        vocab_size = student.config.vocab_size
        batches = measure.sample_batches(
            tokenizer,
            student.num_tokens,
            vocab_size,
            sample=options.sample,
            data_folder=options.data_folder,
        )
        num = sum(len(ids) for ids, _ in batches)
        others = {name: form for name, form in forms.items() if name != "pytorch"}
        differences = measure.compare(others, forms["pytorch"], batches) if others else {}
        for name, found in differences.items():
            log.info(
                "%s against PyTorch on %d inputs: largest difference %.1e, mean %.1e, least "
                "cosine %.4f",
                name,
                num,
                found.largest,
                found.mean,
                found.cosine,
            )
            for what, value in (("largest", found.largest), ("mean", found.mean)):
                report.add(f"{name}/{what} difference", value, "absolute")
                report.figures[-1]["n"] = num
            report.add(f"{name}/least cosine", found.cosine, "cosine")
            report.figures[-1]["n"] = num
            exact = name == "onnx"
            if not (found.largest <= found.allowed if exact else math.isfinite(found.largest)):
                expected = f"at most {found.allowed:.2g}" if exact else "a finite number"
                raise DataError(
                    f"the {name} model differs from PyTorch by {found.largest:.1e} on {num} "
                    f"inputs, expected {expected}; nothing was exported. Leave onnx and onnx-int8 "
                    "out, and please report it with the versions of torch and onnxscript"
                )
        scores: dict[str, float] = {}
        if options.data_folder is not None:
            scores = measure.probe_scores(forms, tokenizer, options.data_folder, student.num_tokens)
            for name, score in scores.items():
                report.add(f"{name}/probe/stsb_spearman", score, "Spearman")
        speeds = measure.measure_speed(forms, vocab_size, student.num_tokens, report)
        heads = [
            f"{what}, batch {batch}"
            for batch in measure.BATCHES
            for what in ("ms", "sequences/s", "faster")
        ]
        length = min(measure.TOKENS, student.num_tokens)
        table = report.table(
            f"Size, speed on {torch.get_num_threads()} CPU threads with {length} tokens, and loss",
            [
                "form",
                "MB",
                *heads,
                "largest difference",
                "mean difference",
                "STS-B Spearman" if scores else "least cosine",
            ],
        )
        for name in forms:
            num_bytes = sum(part.stat().st_size for part in onnx_files(files[name]))
            size = report.add(f"{name}/bytes", num_bytes, "bytes")
            if name == "onnx" and "onnx" not in options.formats:
                continue
            cells, last = ["", ""], ""
            if name in differences:
                found = differences[name]
                cells, last = [f"{found.largest:.1e}", f"{found.mean:.1e}"], f"{found.cosine:.4f}"
            if scores:
                last = f"{scores[name]:.4f}"
            table.rows.append([name, f"{size / 1e6:.1f}", *speeds[name], *cells, last])
        self.scores, self.num_checked = scores, num
        return table

    def _write_card(self, table: Table) -> None:
        folder, formats, pooled = self.folder, self.options.formats, self.pooled
        uses = []
        cut = (
            f" in block {pooled.config.num_hidden_layers}, the last one that was trained"
            if self.is_cut or (pooled.tap == "extra")
            else ""
        )
        normal = ", with length 1" if pooled.sentence.normalizes else ""
        values = {
            "name": folder.name,
            "num_tokens": pooled.num_tokens,
            "cut": cut,
            "normal": normal,
        }
        if "transformers" in formats:
            uses.append(use_text(folder.name, self.main.config))
        if SENTENCE in formats:
            uses.append(SENTENCE_USE.format(**values))
        if "onnx" in formats or "onnx-int8" in formats:
            file = "model.onnx" if "onnx" in formats else "model_int8.onnx"
            uses.append(ONNX_USE.format(**values, file=file))
        if self.not_cut:
            uses.append(NOT_CUT)
        write_card_section(folder, "Use", "\n\n".join(uses))
        facts = machine_facts(None)
        notes = [
            f"Differences from PyTorch on {self.num_checked} inputs of mixed lengths, padded.",
            *(f"{key.capitalize()}: {facts[key]}." for key in ("hardware", "versions")),
        ]
        if "onnx-int8" in formats:
            notes.append("int8: weights per channel, activations quantised while running.")
        text = "\n\n".join([table.markdown(), "\n".join(f"- {note}" for note in notes)])
        write_card_section(folder, "Sizes and speeds", text)
        if card_section(folder, "Licence") is not None:
            write_card_section(folder, "Licence", licence_text(self.main.metadata.get("license")))
        if SENTENCE in formats:
            write_metadata(
                folder,
                library_name=SENTENCE,
                pipeline_tag=SENTENCE_TASK,
                tags=_joined(folder, [SENTENCE]),
            )
        if {"onnx", "onnx-int8"} & set(formats):
            write_metadata(folder, tags=_joined(folder, ["onnx"]))
        if not {"transformers", SENTENCE} & set(formats):
            write_metadata(folder, library_name="onnx")
        score = self.scores.get("pytorch", math.nan)
        if math.isfinite(score) and self.main is self.pooled:
            write_results(folder, folder.name, [_probe_result(score)])
        write_bytes(folder / FIGURES, self.report.json().encode())


def _without_formats(folder: Path) -> dict[str, Any]:
    """Return the metadata of a folder's card without what it says of formats, if it does."""
    card = read_card(folder)
    data: Any = card.data if card else {}
    found: dict[str, Any] = {}
    if data.get("library_name") in (SENTENCE, "onnx"):
        found["library_name"] = "transformers"
    if data.get("pipeline_tag") == SENTENCE_TASK:
        found["pipeline_tag"] = "feature-extraction"
    if tags := data.get("tags"):
        found["tags"] = [tag for tag in tags if tag not in (SENTENCE, "onnx")]
    return found


def _joined(folder: Path, tags: Sequence[str]) -> list[str]:
    card = read_card(folder)
    return list(dict.fromkeys([*((card.data.get("tags") if card else None) or []), *tags]))


def _probe_result(score: float) -> EvalResult:
    return EvalResult(
        task_type=SENTENCE_TASK,
        task_name="Semantic Textual Similarity",
        dataset_type="nyu-mll/glue",
        dataset_name="GLUE STS-B, without fine-tuning",
        dataset_config="stsb",
        dataset_split="validation",
        metric_type="spearman_cosine",
        metric_name="Spearman, cosine of the mean hidden states, %",
        metric_value=round(100 * score, 2),
    )
