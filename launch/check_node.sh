#!/usr/bin/env bash
# Check this node before a run: launch/check_node.sh RUN_FOLDER [FILE that another node made and this one must see]
#
# NUM_PROCESSES   GPUs that must be there; unless set, what is there is told
# MIN_FREE_GB     free space that must be there (default: 5)

set -euo pipefail
source "$(dirname "$0")/common.sh"
help_if_asked "$@"

PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec python - "$@" <<'PYTHON'
import importlib.util, os, shutil, socket, sys, tempfile

folder, shared = sys.argv[1], sys.argv[2:]
where = f"node {socket.gethostname()}"
needed = ("torch", "deepspeed", "transformers", "scaledistill")
if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
    sys.exit(f"{where}: {sys.executable} has no {', '.join(missing)}; is this the right environment?")
import torch

problems = []
gpus, wanted = torch.cuda.device_count(), os.environ.get("NUM_PROCESSES", "auto")
if gpus and wanted.isdecimal() and gpus < int(wanted):
    problems.append(f"{gpus} GPUs are visible, NUM_PROCESSES={wanted} wanted")
try:
    with tempfile.NamedTemporaryFile(dir=folder):
        pass
    free = shutil.disk_usage(folder).free / 1e9
    if free < float(os.environ.get("MIN_FREE_GB", "5")):
        problems.append(f"{free:.1f} GB free in {folder}, MIN_FREE_GB={os.environ.get('MIN_FREE_GB', '5')} wanted")
except OSError as error:
    problems.append(f"run.folder={folder} can't be written: {error.strerror}; it must be on storage that all nodes share")
if shared and not os.path.exists(shared[0]):
    problems.append(f"{shared[0]} of the first node is not seen here; run.folder must be on storage that all nodes share")
if problems:
    sys.exit("\n".join(f"{where}: {problem}" for problem in problems))
print(f"{where}: ready, {gpus} GPUs, {free:.0f} GB free")
PYTHON
