#!/usr/bin/env bash
# Check this node before a run: launch/check_node.sh RUN_FOLDER [FILE]
#
# FILE was made by another node; this node must see it, since the nodes share the run folder. These
# are the quick ones of the checks of `doctor`, which has more.
#
# NUM_PROCESSES   required number of GPUs (default: any; the number is printed)
# MIN_FREE_GB     required free space in RUN_FOLDER, in GB (default: 5)

set -euo pipefail
source "$(dirname "$0")/common.sh"
help_if_asked "$@"

[[ $# != 0 ]] || fail "expected a run folder; --help says more"
options=(--only "versions,gpu,network,disk,shm,limits" --run-folder "$1")
options+=(--min-free-gb "${MIN_FREE_GB:-5}")
[[ -z ${2:-} ]] || options+=(--shared-file "$2")
if [[ ${NUM_PROCESSES:-auto} =~ ^[0-9]+$ ]] && command -v nvidia-smi >/dev/null; then
  options+=(--num-gpus "$NUM_PROCESSES") # without GPUs, it is the number of ranks on CPUs
fi
# Not by -m, which imports files of the working folder.
main="import sys; sys.path[:] = filter(None, sys.path)
from scaledistill.cli.command import main; sys.exit(main())"
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$python" -c "$main" doctor "${options[@]}" |
  sed "s/^/node $(hostname): /"
