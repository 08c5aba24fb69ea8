"""A teacher loads only what it needs, proves that it came from the file, and runs frozen."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENCODER_SIZES as SIZES
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    ElectraConfig,
    FunnelConfig,
    PreTrainedConfig,
    RobertaConfig,
)

from scaledistill.data.tokens import TokenInputs
from scaledistill.errors import ConfigError, DataError
from scaledistill.models.architectures import build_encoder
from scaledistill.models.teacher import (
    Teacher,
    load_config,
    load_encoder,
    resolve_folder,
    weights_sha256,
)
from scaledistill.models.view import capture_qkv

IDS_BT = torch.randint(3, 97, (3, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model with its head, as people publish them."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_loads_only_the_first_layers_and_names_the_head_once(
    saved: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        encoder = load_encoder(saved, num_layers=3)
    assert capfd.readouterr() == ("", "")
    [record] = caplog.records  # the head, once
    assert record.getMessage() == (
        f"{saved}: weights that an encoder has no use for are left out: cls"
    )
    whole = BertModel.from_pretrained(saved, add_pooling_layer=False).eval()
    assert encoder.config.num_hidden_layers == len(encoder.encoder.layer) == 3
    assert encoder.pooler is None
    assert not encoder.training
    names = {name for name in whole.state_dict() if "layer.3." not in name}
    assert set(encoder.state_dict()) == names
    with torch.no_grad():
        assert all(
            map(
                torch.equal,
                capture_qkv(encoder, 3, input_ids=IDS_BT),
                capture_qkv(whole, 3, input_ids=IDS_BT),
            )
        )


def test_sharded_files_and_dtype(saved: Path, tmp_path: Path) -> None:
    BertForMaskedLM.from_pretrained(saved).save_pretrained(tmp_path, max_shard_size="30KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    encoder = load_encoder(tmp_path, num_layers=2, dtype=torch.bfloat16)
    assert encoder.dtype is torch.bfloat16
    one_file = load_encoder(saved, num_layers=2, dtype=torch.bfloat16)
    assert weights_sha256(encoder) == weights_sha256(one_file)
    missing = sorted(tmp_path.glob("model-*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(
        DataError, match=f"lacks {missing.name}; give a folder with all of its safetensors files"
    ):
        load_encoder(tmp_path)


@pytest.mark.parametrize("kind", ["electra", "roberta"])
def test_other_architectures(kind: str, tmp_path: Path) -> None:
    config = (
        ElectraConfig(**SIZES, embedding_size=32) if kind == "electra" else RobertaConfig(**SIZES)
    )
    model = build_encoder(config).eval()
    model.save_pretrained(tmp_path)
    teacher = Teacher(load_encoder(tmp_path, num_layers=2), 2)
    assert all(
        map(torch.equal, teacher(TokenInputs(IDS_BT)), capture_qkv(model, 2, input_ids=IDS_BT))
    )


def test_frozen_whatever_happens(saved: Path) -> None:
    teacher = Teacher(load_encoder(saved, num_layers=3), 3)
    first = teacher(TokenInputs(IDS_BT))
    assert not any(tensor.requires_grad for tensor in (*first, *teacher.parameters()))
    torch.nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    assert all(map(torch.equal, teacher(TokenInputs(IDS_BT)), first))
    assert teacher.num_parameters == sum(parameter.numel() for parameter in teacher.parameters())
    assert not any("layer.2.output" in name for name, _ in teacher.named_parameters())


def test_dtype_of_the_run(saved: Path) -> None:
    teacher = Teacher(load_encoder(saved, num_layers=3), 3, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in (*teacher(TokenInputs(IDS_BT)), *teacher.parameters())} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_padding_changes_nothing_for_real_tokens(kind: str) -> None:
    """RoBERTa counts positions from the ids: padded rows must give what the packed row gives."""
    classes: dict[str, type[PreTrainedConfig]] = {
        "bert": BertConfig,
        "roberta": RobertaConfig,
        "electra": ElectraConfig,
    }
    config = classes[kind](**SIZES)
    teacher = Teacher(build_encoder(config), 3)
    length = 11
    ids_BT = IDS_BT.clone()
    ids_BT[:, length:] = config.pad_token_id
    mask_BT = torch.arange(IDS_BT.shape[1]).expand_as(IDS_BT) < length
    short = teacher(TokenInputs(IDS_BT[:, :length]))
    padded = teacher(TokenInputs(ids_BT, mask_BT))
    for expected, found in zip(short, padded, strict=True):
        torch.testing.assert_close(found[:, :length], expected, rtol=0, atol=2e-6)
    for expected, found in zip(
        short, teacher(TokenInputs(IDS_BT[:, :length], mask_BT[:, :length])), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_sha256_is_that_of_the_weights_in_use(saved: Path, copied: Path) -> None:
    sha256 = Teacher(load_encoder(saved, num_layers=3), 3).sha256
    assert Teacher(load_encoder(saved), 3, dtype=torch.bfloat16).sha256 == sha256
    assert Teacher(load_encoder(saved, num_layers=2), 2).sha256 != sha256
    weights = load_file(copied / "model.safetensors")
    # Above the projections: not in use.
    weights["bert.encoder.layer.2.output.dense.weight"][0, 0] += 1
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert Teacher(load_encoder(copied, num_layers=3), 3).sha256 == sha256
    weights["bert.encoder.layer.2.attention.self.value.bias"][0] += 1
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert Teacher(load_encoder(copied, num_layers=3), 3).sha256 != sha256


def test_missing_and_mismatched_weights(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    name = "bert.encoder.layer.1.attention.self.key.weight"
    save_file(
        {key: value for key, value in weights.items() if key != name},
        copied / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        DataError,
        match=r"lacks weights that are needed: encoder.layer.1.attention.self.key.weight \(not in",
    ):
        load_encoder(copied)
    load_encoder(copied, num_layers=1)
    save_file(weights | {name: torch.zeros(48, 32)}, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        DataError,
        match=r"layer.1.attention.self.key.weight \(file: \[48, 32\], config: \[48, 48\]\)",
    ):
        load_encoder(copied)


def test_pickled_and_damaged_files(copied: Path) -> None:
    weights = copied / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        DataError,
        match=r"^model='.*': model.safetensors cannot be read \(.*\); fetch the model",
    ):
        load_encoder(copied)
    weights.rename(copied / "pytorch_model.bin")
    with pytest.raises(
        DataError,
        match=(
            r"has pickled weights only \(pytorch_model.bin\), .* expected model.safetensors. .* "
            r"convert"
        ),
    ):
        load_encoder(copied)
    index = copied / "model.safetensors.index.json"
    for content, message in (
        (
            {"weight_map": {"a": "pytorch_model.bin"}},
            "names 'pytorch_model.bin'; expected safetensors files",
        ),
        (
            {"weight_map": {"a": "../model.safetensors"}},
            "names '../model.safetensors'; expected safetensors files",
        ),
        ({}, "model.safetensors.index.json is not a weight index"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(DataError, match=message):
            load_encoder(copied)
    index.unlink()
    (copied / "pytorch_model.bin").unlink()
    with pytest.raises(DataError, match=r"lacks model.safetensors; give a folder with all"):
        load_encoder(copied)


def test_layer_beyond_the_model(saved: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^num_layers=30 is beyond the model's 4 layers; use 1 to 4"
    ):
        load_encoder(saved, num_layers=30)


def test_config_refusals(saved: Path, tmp_path: Path) -> None:
    assert load_config(saved).num_hidden_layers == 4
    with pytest.raises(
        DataError,
        match=r"^model='.*' has no config.json; give the folder that save_pretrained wrote",
    ):
        load_config(tmp_path)
    for content, error, message in (
        (
            "{",
            DataError,
            r"^model='.*': its config.json cannot be used \(.*not a valid JSON",
        ),
        (
            '{"model_type": "bert", "hidden_size": "wide"}',
            DataError,
            "cannot be used .*hidden_size",
        ),
        ("{}", DataError, "cannot be used .*model_type"),
        (
            '{"model_type": "new", "auto_map": {"AutoConfig": "a.B"}}',
            ConfigError,
            "^model=.*; if you trust that code, set trust_remote_code=true",
        ),
        (
            json.dumps(FunnelConfig().to_dict()),
            ConfigError,
            "^model='.*' is of type 'funnel', which is not supp",
        ),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(error, match=message):
            load_config(tmp_path)


def test_remote_code_is_run_only_when_trusted(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.setattr("sys.path", [*sys.path])
    config = json.loads((copied / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "code.CustomConfig"}}
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "code.py").write_text("raise RuntimeError('the code of the model ran')\n")
    with pytest.raises(
        ConfigError, match="runs only with Python code of its own, which is refused"
    ):
        load_config(copied)
    with pytest.raises(DataError, match="the code of the model ran"):
        load_config(copied, trust_remote_code=True)


def test_hub_names(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str | None, list[str]]] = []

    def download(
        name: str, *, revision: str | None, allow_patterns: list[str], cache_dir: str | None
    ) -> str:
        calls.append((name, revision, allow_patterns))
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_encoder("some/model", revision="v2", num_layers=1).config.num_hidden_layers == 1
    assert {call[:2] for call in calls} == {("some/model", "v2")}
    assert not any(pattern.endswith((".bin", "*")) for call in calls for pattern in call[2])

    def offline(name: str, **_: object) -> str:
        raise LocalEntryNotFoundError("Got: ConnectError")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        DataError,
        match=r"^model='some/model' is not a folder, and the hub gave .*'v2' \(Got: Conn",
    ):
        load_config("some/model", "v2")


def test_missing_folder() -> None:
    looked = re.escape(f"(looked for in the working folder {Path.cwd()})")
    with pytest.raises(
        DataError,
        match=rf"^model='./no/such/folder': no such folder; give a model's .* {looked}",
    ):
        resolve_folder("./no/such/folder", None, ["config.json"])


@pytest.mark.parametrize(
    "name", ["./modls/first", "models/sub/frist", "../{here}/models/fist", "~/models/first/x/.."]
)
def test_a_misspelt_folder_is_not_looked_for_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("models/first", "models/sub/first"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    name = name.format(here=tmp_path.name)
    with pytest.raises(
        DataError,
        match=rf"^model='{name}': no such folder; (did you mean .*first\?|give a model's)",
    ):
        resolve_folder(name, None, ["config.json"])


def test_a_name_of_two_parts_is_asked_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(name: str, **_: object) -> str:
        raise LocalEntryNotFoundError("no network")

    (tmp_path / "models" / "first").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        DataError,
        match=r"no such model \(no network\); did you mean the folder models/first\? Other",
    ):
        resolve_folder("models/frist", None, ["config.json"])
