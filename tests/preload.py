"""Imports and computes, once, what every rank would: for the process that ranks are forked from."""

import gc
import importlib
import os
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

for name in (
    "deepspeed.runtime.zero.muon.original_muon",
    "deepspeed.runtime.zero.stage3",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "transformers.models.bert.modeling_bert",
    "scaledistill.engines.deepspeed",
    "scaledistill.engines.fsdp",
    "scaledistill.engines.zero",
    "scaledistill.training.loop",
    "scaledistill.training.maps",
):
    importlib.import_module(name)

import torch  # noqa: E402 - after DeepSpeed's choice of an accelerator
from conftest import TEACHER_SIZES, tiny_tree  # noqa: E402
from transformers import BertConfig  # noqa: E402
from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402

from scaledistill.config.load import parse_config  # noqa: E402
from scaledistill.preflight.checks import student_shape  # noqa: E402
from scaledistill.preflight.estimate import estimate  # noqa: E402
from scaledistill.preflight.resolve import resolve  # noqa: E402

get_checkpoint_conversion_mapping("bert")
if torch.version.cuda is None:  # a backward with GPUs starts threads, which would not be forked
    torch.set_num_threads(1)
    config = parse_config(tiny_tree(Path(), Path("teacher"), Path("shards")))
    teacher = BertConfig(**TEACHER_SIZES)
    shape = student_shape(config, "l2", teacher)
    estimate(resolve(config, 1, torch.device("cpu")), teacher, {"l2": shape})

gc.freeze()  # a rank's garbage collector has only the rank's own objects to go through
