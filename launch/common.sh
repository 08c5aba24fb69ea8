# Functions for the launchers, which source this file. A script's first comment is its help.
# shellcheck shell=bash
[[ $0 == /* ]] && script=$0 || script=$PWD/$0
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if ! command -v deepspeed >/dev/null && [[ -x $root/.venv/bin/deepspeed ]]; then
  PATH=$root/.venv/bin:$PATH # the environment that `make venv` creates
fi
# Debian and RHEL have the second only.
python=$(command -v python || command -v python3) || {
  echo "$0: no python3 on PATH" >&2
  exit 2
}

fail() {
  echo "$(basename "$0"): $1" >&2
  exit 2
}

help_if_asked() { # "$@": after --help, print the script's first comment and exit
  if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^$/{/^#SBATCH/d;s/^# \{0,1\}//p;}' "$script"
    exit 0
  fi
}

# free_port [FIRST [only]]: print the first free port from FIRST up, or with "only" FIRST if it is
# free; without FIRST any free port.
free_port() {
  "$python" - "${1:-0}" "${2:-}" <<'PYTHON'
import socket, sys
first, number = int(sys.argv[1]), 1 if sys.argv[2] == "only" else 500
for port in range(first, first + number if first else 1):
    with socket.socket() as probe:
        # As torch does: a port that was released just now counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            continue
        sys.exit(print(probe.getsockname()[1]))
sys.exit(f"no free port from {first} to {first + number - 1}; set MASTER_PORT")
PYTHON
}

# choose_gpus N: set `gpus` to DeepSpeed's options for N GPUs, those of CUDA_VISIBLE_DEVICES first,
# which DeepSpeed ignores beside such options.
# shellcheck disable=SC2034 # the scripts read `gpus`
choose_gpus() {
  [[ $1 =~ ^[1-9][0-9]*$ ]] || fail "found NUM_PROCESSES=$1, expected 1 or more"
  gpus=(--num_gpus "$1")
  if [[ -n ${CUDA_VISIBLE_DEVICES-} ]] && command -v nvidia-smi >/dev/null; then
    local found="found CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES" visible
    if [[ ! $CUDA_VISIBLE_DEVICES =~ ^[0-9]+(,[0-9]+)*$ ]]; then
      fail "$found, but DeepSpeed's launcher knows GPUs by number only; use scaledistill distill"
    fi
    IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
    (($1 <= ${#visible[@]})) || fail "$found, expected $1 GPUs, one for each rank"
    gpus=(--include "localhost:$(IFS=, && echo "${visible[*]:0:$1}")")
    unset CUDA_VISIBLE_DEVICES # DeepSpeed would say that it ignores it
  fi
}

# run_deepspeed OPTIONS…: replace this shell by DeepSpeed's launcher; on Ctrl-C wait for the ranks,
# without the launcher's traceback.
run_deepspeed() {
  exec "$python" -c '
import os, sys
from deepspeed.launcher.runner import main
try:
    main()
except KeyboardInterrupt:  # the ranks get it too: they save and stop, or are killed after 30 s
    try:
        while True:
            os.wait()
    except (ChildProcessError, KeyboardInterrupt):
        sys.exit(130)
' "$@"
}
