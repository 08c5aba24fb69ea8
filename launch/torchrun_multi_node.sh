#!/usr/bin/env bash
# Distil on several nodes: run on each of them, with the same variables:
#   HEAD_ADDRESS=node1 NUM_NODES=2 launch/torchrun_multi_node.sh --config FILE [options of launch/distill.py]
#
# The nodes meet at the head. Where a process dies, all are started again and go on from the last checkpoint; with a
# range of nodes also without a node that is gone, or with one that came back, as long as train.global_batch_size
# divides. The same command resumes. Under Kubeflow's torch runtime its PET_ variables serve as defaults.
#
# HEAD_ADDRESS    name or address of one of the nodes
# NUM_NODES       nodes, or MIN:MAX (default: 1)
# NUM_PROCESSES   ranks on each node (default: auto, one a GPU)
# MASTER_PORT     port of the meeting at the head, the same for all (default: 29500)
# MAX_RESTARTS    restarts before the job fails (default: 3)
# JOB_ID          name of the job, the same for all (default: distill)
# LOCAL_ADDRESS   this node's address for the others (default: that of the interface which leads to the head)

set -euo pipefail
source "$(dirname "$0")/common.sh"
help_if_asked "$@"

HEAD_ADDRESS=${HEAD_ADDRESS:-${PET_MASTER_ADDR:-}}
[[ $HEAD_ADDRESS ]] || fail "HEAD_ADDRESS is not set; give the name or address of one of the nodes, see --help"
MASTER_PORT=${MASTER_PORT:-${PET_MASTER_PORT:-29500}}

# torchrun would tell by the host's name whether it is the head, and announce that name: both fail where the name leads
# to another interface or to 127.0.1.1.
found=$(python - "$HEAD_ADDRESS" "$MASTER_PORT" <<'PYTHON'
import socket, sys, time
head, port = sys.argv[1:]
for attempt in range(60):  # a pod's name may be known a little later than the pod itself
    try:
        family, kind, _, _, address = socket.getaddrinfo(head, int(port), type=socket.SOCK_DGRAM)[0]
        break
    except socket.gaierror as error:
        if attempt == 59:
            sys.exit(f"HEAD_ADDRESS={head} is not known here: {error}")
        if attempt == 0:
            print(f"HEAD_ADDRESS={head} is not known here yet; trying for two minutes", file=sys.stderr)
        time.sleep(2)
with socket.socket(family, kind) as probe:
    try:
        probe.connect(address)
    except OSError as error:
        sys.exit(f"HEAD_ADDRESS={head} can't be reached from here: {error}")
    own = probe.getsockname()[0]
with socket.socket(family, socket.SOCK_STREAM) as probe:
    try:
        probe.bind((address[0], 0))  # only an address of this machine can be bound
        is_head = "true"
    except OSError:
        is_head = "false"
print(is_head, own)
PYTHON
) || exit 2
read -r is_head own_address <<<"$found"

# torchrun ends in a traceback where something else holds the port of the meeting.
if [[ $is_head == true ]] && ! free_port "$MASTER_PORT" only >/dev/null 2>&1; then
  echo "torchrun_multi_node.sh: port $MASTER_PORT of this machine is in use; unless another node of this job that runs" \
    "here holds it, set MASTER_PORT to a free one, the same for all nodes" >&2
fi

# Where the link to the head is cut, torchrun waits in a call to it until the kernel gives up, a quarter of an hour later,
# and does not see that its ranks have left: ranks that nobody collects tell.
agent=$$ # this shell becomes it
(
  own=$BASHPID seconds=0
  while sleep 1 && [[ $(ps -o ppid= -p "$own") -eq $agent ]]; do # it has another parent once torchrun is gone
    if [[ $(ps -o stat= --ppid "$agent") == *Z* ]]; then seconds=$((seconds + 1)); else seconds=0; fi
    if ((seconds >= 60)); then
      echo "torchrun_multi_node.sh: ranks ended ${seconds} s ago and torchrun does not answer: ending it" >&2
      kill -KILL "$agent"
    fi
  done
) >/dev/null &

# Else all starts of a job share one store, in which ranks find the addresses of those that are gone.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun --nnodes "${NUM_NODES:-${PET_NNODES:-1}}" --nproc-per-node "${NUM_PROCESSES:-${PET_NPROC_PER_NODE:-auto}}" \
  --max-restarts "${MAX_RESTARTS:-3}" --rdzv-backend c10d --rdzv-id "${JOB_ID:-distill}" \
  --rdzv-endpoint "$HEAD_ADDRESS:$MASTER_PORT" --rdzv-conf "is_host=$is_head" \
  --local-addr "${LOCAL_ADDRESS:-$own_address}" "$root/launch/distill.py" "$@"
