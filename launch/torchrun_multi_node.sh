#!/usr/bin/env bash
# Distil on several nodes; run it on each node with the same variables:
#   HEAD_ADDRESS=node1 NUM_NODES=2 launch/torchrun_multi_node.sh --config FILE \
#     [options of launch/distill.py]
#
# The nodes rendezvous at the head. If a process dies, all processes are restarted and resume from
# the last checkpoint. With a range of nodes the run also continues without a lost node, or with one
# that has returned, if train.global_batch_size can be divided among the ranks. Rerun the same
# command to resume. Under Kubeflow's torch runtime, its PET_ variables are the defaults.
#
# HEAD_ADDRESS    name or address of one of the nodes
# NUM_NODES       number of nodes, or MIN:MAX (default: 1)
# NUM_PROCESSES   ranks per node (default: auto, one per GPU)
# MASTER_PORT     rendezvous port on the head, the same on all nodes (default: 29500)
# MAX_RESTARTS    restarts before the job fails (default: 3)
# JOB_ID          name of the job, the same on all nodes (default: distill)
# LOCAL_ADDRESS   this node's address, as seen by the other nodes
#                 (default: that of the interface used to reach the head)

set -euo pipefail
source "$(dirname "$0")/common.sh"
help_if_asked "$@"

# As process 1 of a container, torchrun would not reap orphans, and the kernel would not let it be
# killed below.
if (($$ == 1)); then
  bash "$0" "$@" &
  child=$! code=0
  trap 'kill -TERM "$child"' TERM INT
  while kill -0 "$child" 2>/dev/null; do # a signal ends `wait` early
    code=0
    wait "$child" || code=$?
  done
  exit "$code"
fi

HEAD_ADDRESS=${HEAD_ADDRESS:-${PET_MASTER_ADDR:-}}
[[ $HEAD_ADDRESS ]] ||
  fail "HEAD_ADDRESS is not set; give the name or address of one of the nodes, see --help"
MASTER_PORT=${MASTER_PORT:-${PET_MASTER_PORT:-29500}}
nodes=${NUM_NODES:-${PET_NNODES:-1}}

# torchrun would compare the host's name to find out whether it is the head, and announce that name.
# Both fail if the name resolves to another interface or, as on the head itself under Debian, to
# 127.0.1.1.
addresses=$("$python" - "$HEAD_ADDRESS" "$MASTER_PORT" "$nodes" <<'PYTHON'
import ipaddress, socket, sys, time
head, port, nodes = sys.argv[1:]
def is_loopback(address):
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
def is_name(address):
    try:
        ipaddress.ip_address(address)
        return False
    except ValueError:
        return address != "localhost"
for attempt in range(60):  # a pod's name may resolve a little later than the pod starts
    try:
        family, kind, _, _, address = socket.getaddrinfo(head, int(port), type=socket.SOCK_DGRAM)[0]
        break
    except socket.gaierror as error:
        if attempt == 59:
            sys.exit(f"HEAD_ADDRESS={head} is not known here: {error}")
        if attempt == 0:
            print(
                f"HEAD_ADDRESS={head} is not known here yet; trying for two minutes",
                file=sys.stderr,
            )
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
if is_loopback(own) and is_name(head) and nodes != "1":
    # Of the interface with the default route; nothing is sent.
    remote = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}[family]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((remote, 1))
            own = probe.getsockname()[0]
        except OSError:
            sys.exit(
                f"HEAD_ADDRESS={head} is {own} here, where no other node can reach it, and there "
                "is no default route; set LOCAL_ADDRESS to this node's address"
            )
print(is_head, own)
PYTHON
) || exit 2
read -r is_head own_address <<<"$addresses"

# torchrun ends in a traceback if another process has the rendezvous port.
if [[ $is_head == true ]] && ! free_port "$MASTER_PORT" only >/dev/null 2>&1; then
  echo "torchrun_multi_node.sh: port $MASTER_PORT of this machine is in use; unless another node" \
    "of this job runs here and uses it, set MASTER_PORT to a free one, the same on all nodes" >&2
fi

# If the link to the head is cut, torchrun blocks in a call to it until the kernel gives up after 15
# minutes, and does not notice that its ranks have ended. Ranks that stay zombies show that.
agent=$$ # `exec` below turns this shell into torchrun
(
  own=$BASHPID seconds=0
  # Once torchrun has ended, this subshell has another parent.
  while sleep 1 && [[ $(ps -o ppid= -p "$own") -eq $agent ]]; do
    if [[ $(ps -o stat= --ppid "$agent") == *Z* ]]; then
      seconds=$((seconds + 1))
    else
      seconds=0
    fi
    if ((seconds >= 60)); then
      echo "torchrun_multi_node.sh: ranks ended ${seconds} s ago and torchrun does not respond:" \
        "killing it" >&2
      kill -KILL "$agent"
    fi
  done
) >/dev/null &

# Otherwise all restarts of a job share one store, where ranks find the addresses of ended ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun --nnodes "$nodes" \
  --nproc-per-node "${NUM_PROCESSES:-${PET_NPROC_PER_NODE:-auto}}" \
  --max-restarts "${MAX_RESTARTS:-3}" --rdzv-backend c10d --rdzv-id "${JOB_ID:-distill}" \
  --rdzv-endpoint "$HEAD_ADDRESS:$MASTER_PORT" --rdzv-conf "is_host=$is_head" \
  --local-addr "${LOCAL_ADDRESS:-$own_address}" "$root/launch/distill.py" "$@"
