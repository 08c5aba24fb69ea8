#!/usr/bin/env bash
# Check this node before a run: launch/check_node.sh RUN_FOLDER [FILE]
#
# FILE was made by another node; this node must see it, since the nodes share the run folder.
#
# NUM_PROCESSES   required number of GPUs (default: any; the number is printed)
# MIN_FREE_GB     required free space in RUN_FOLDER, in GB (default: 5)

set -euo pipefail
source "$(dirname "$0")/common.sh"
help_if_asked "$@"

PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec python - "$@" <<'PYTHON'
import importlib.util, os, shutil, socket, sys, tempfile

folder, shared = sys.argv[1], sys.argv[2:]
where = f"node {socket.gethostname()}"
needed = ("torch", "deepspeed", "transformers", "scaledistill")
if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
    sys.exit(
        f"{where}: {sys.executable} has no {', '.join(missing)}; is this the right environment?"
    )
import torch

problems = []
gpus, wanted = torch.cuda.device_count(), os.environ.get("NUM_PROCESSES", "auto")
if gpus and wanted.isdecimal() and gpus < int(wanted):
    problems.append(f"{gpus} GPUs are visible, expected NUM_PROCESSES={wanted}")
try:
    with tempfile.NamedTemporaryFile(dir=folder):
        pass
    free = shutil.disk_usage(folder).free / 1e9
    least = os.environ.get("MIN_FREE_GB", "5")
    if free < float(least):
        problems.append(f"{free:.1f} GB free in {folder}, expected MIN_FREE_GB={least}")
except OSError as error:
    problems.append(
        f"run.folder={folder} can't be written: {error.strerror}; "
        "it must be on storage that all nodes share"
    )
if shared and not os.path.exists(shared[0]):
    problems.append(
        f"{shared[0]}, made by the first node, is not visible here; "
        "run.folder must be on storage that all nodes share"
    )
if problems:
    sys.exit("\n".join(f"{where}: {problem}" for problem in problems))
print(f"{where}: ready, {gpus} GPUs, {free:.0f} GB free")
PYTHON
