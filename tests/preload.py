"""Imports, once, what every rank would import: for the process that ranks are forked from."""

import gc
import importlib
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

for name in (
    "deepspeed.runtime.zero.muon.original_muon",
    "deepspeed.runtime.zero.stage3",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "transformers.conversion_mapping",
    "transformers.models.bert.modeling_bert",
    "scaledistill.engines.deepspeed",
    "scaledistill.training.loop",
):
    importlib.import_module(name)

gc.freeze()  # a rank's garbage collector has only the rank's own objects to go through
