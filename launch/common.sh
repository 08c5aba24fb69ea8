# Shared by the launchers, which source it. The head of each script is its help.
# shellcheck shell=bash
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if ! command -v deepspeed >/dev/null && [[ -x $root/.venv/bin/deepspeed ]]; then
  PATH=$root/.venv/bin:$PATH # that of `make venv`
fi

fail() {
  echo "$(basename "$0"): $1" >&2
  exit 2
}

help_if_asked() { # "$@": print the script's head and leave, where it begins with --help
  if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^$/{/^#SBATCH/d;s/^# \{0,1\}//p;}' "$0"
    exit 0
  fi
}

free_port() { # [FIRST [only]]: the first free port from FIRST up, or FIRST itself; any free one unless said
  python - "${1:-0}" "${2:-}" <<'PYTHON'
import socket, sys
first, number = int(sys.argv[1]), 1 if sys.argv[2] == "only" else 500
for port in range(first, first + number if first else 1):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does: what was just left is free
        try:
            probe.bind(("", port))
        except OSError:
            continue
        sys.exit(print(probe.getsockname()[1]))
sys.exit(f"no free port from {first} to {first + number - 1}; set MASTER_PORT")
PYTHON
}

run_deepspeed() { # OPTIONS…: be DeepSpeed's launcher, but answer Ctrl-C without its traceback and wait for the ranks
  exec python -c '
import os, sys
from deepspeed.launcher.runner import main
try:
    main()
except KeyboardInterrupt:  # the ranks got it too: they save and stop, or are killed after 30 s
    try:
        while True:
            os.wait()
    except (ChildProcessError, KeyboardInterrupt):
        sys.exit(130)
' "$@"
}
