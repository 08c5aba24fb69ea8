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

free_port() { # [FIRST]: the first free port from FIRST up; any free one unless said
  python - "${1:-0}" <<'PYTHON'
import socket, sys
first = int(sys.argv[1])
for port in range(first, first + 500 if first else 1):
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            continue
        sys.exit(print(probe.getsockname()[1]))
sys.exit(f"no free port from {first} to {first + 499}; set MASTER_PORT")
PYTHON
}
