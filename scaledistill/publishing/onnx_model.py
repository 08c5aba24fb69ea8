"""ONNX models of an encoder: written by PyTorch's exporter, quantised and run by onnxruntime.

Inputs: encoders, token ids. Outputs: `.onnx` files, and what they compute. Not handled here: the
folder around them and the comparison (`publishing.formats`, `publishing.measure`).

Legend: B sequences, T tokens, D width.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scaledistill.errors import SettingError

INPUTS = ("input_ids", "attention_mask")
OUTPUTS = ("last_hidden_state", "sentence_embedding")


class SentenceEncoder(nn.Module):
    """An encoder whose second output, [B, D], is the mean of the hidden states of real tokens.

    With `normalizes`, the means have length 1.
    """

    def __init__(self, encoder: PreTrainedModel, *, normalizes: bool = False) -> None:
        super().__init__()
        self.encoder, self.normalizes = encoder, normalizes

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        hidden_BTD = self.encoder(
            input_ids=input_ids_BT, attention_mask=attention_mask_BT
        ).last_hidden_state
        mask_BT1 = attention_mask_BT.unsqueeze(-1).to(hidden_BTD.dtype)
        mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)
        return hidden_BTD, nn.functional.normalize(mean_BD) if self.normalizes else mean_BD


class OnnxEncoder:
    """An ONNX file, run by onnxruntime on the CPU with as many threads as PyTorch."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Otherwise its threads spin after each call and take the cores from PyTorch's turn.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden states, [B, T, D], and their means, [B, D]."""
        inputs = (input_ids_BT.numpy(), attention_mask_BT.numpy())
        hidden, mean = self._session.run(list(OUTPUTS), dict(zip(INPUTS, inputs, strict=True)))
        return torch.from_numpy(hidden), torch.from_numpy(mean)


def write_onnx(encoder: PreTrainedModel, path: Path, *, normalizes: bool = False) -> None:
    """Write an encoder as an ONNX file with inputs of any batch size and length.

    Its outputs are those of `SentenceEncoder`.

    Raises:
        SettingError: PyTorch's exporter cannot export this architecture.
    """
    ids_BT = torch.arange(5, 23).reshape(2, 9) % encoder.config.vocab_size
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 6:] = 0
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                SentenceEncoder(encoder, normalizes=normalizes).eval(),
                (ids_BT, mask_BT),
                dynamo=True,
                dynamic_shapes=(any_size, any_size),
                input_names=list(INPUTS),
                output_names=list(OUTPUTS),
                verbose=False,
            )
        assert program is not None
        program.save(path)
    except OSError:
        raise
    except Exception as error:
        raise SettingError(
            "formats",
            expected=f": torch.onnx cannot export models of type {encoder.config.model_type!r} "
            f"({str(error).strip().partition(chr(10))[0]})",
            remedy="leave onnx and onnx-int8 out",
        ) from error


def onnx_files(path: Path) -> list[Path]:
    """Return the files of a model: weights of more than 1.5 GiB are in a second one."""
    return [part for part in (path, path.with_name(f"{path.name}.data")) if part.exists()]


def quantize(path: Path, quantized: Path) -> None:
    """Write an ONNX file with int8 weights; activations are quantised while it runs."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        # Without reduce_range, products of 8 bits overflow on CPUs that lack VNNI instructions.
        quantize_dynamic(
            path, quantized, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back messages of the exporters that are not about the model."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
