#!/usr/bin/env bash
# Distil on the hosts of a DeepSpeed hostfile:
#   launch/multi_node.sh --config FILE [options of launch/distill.py]
#
# Run it on one host. Each line of the hostfile has a host and its GPUs: "node1 slots=8". It needs
# pdsh here, ssh without a password to every host, and this folder at the same path on all hosts.
# DeepSpeed passes the variables PYTHON* and, if this host has a GPU, NCCL_* to the other hosts; put
# others, such as PATH, into a file .deepspeed_env (NAME=VALUE lines) here or in your home folder.
#
# Rerun the same command to resume. To stop the run, create a file named STOP in the run folder; on
# Ctrl-C DeepSpeed's launcher kills the processes on all hosts.
#
# HOSTFILE       the hostfile (default: hostfile)
# HEAD_ADDRESS   address of the hostfile's first host, as seen by the other hosts
#                (default: the first that `hostname -I` prints there)
# MASTER_PORT    port of the ranks' store on that host (default: one that is free here)
# NUM_PROCESSES  ranks per host (default: its slots)

set -euo pipefail
source "$(dirname "$0")/common.sh"
help_if_asked "$@"

HOSTFILE=${HOSTFILE:-hostfile}
[[ -r $HOSTFILE ]] ||
  fail "no hostfile $HOSTFILE; write lines such as 'node1 slots=8', or set HOSTFILE"
command -v pdsh >/dev/null ||
  fail "pdsh is not installed; install it, or use launch/torchrun_multi_node.sh"
MASTER_PORT=${MASTER_PORT:-$(free_port)}
export MASTER_PORT
run_deepspeed --quiet --force_multi --hostfile "$HOSTFILE" --launcher pdsh \
  --master_port "$MASTER_PORT" \
  ${HEAD_ADDRESS:+--master_addr "$HEAD_ADDRESS"} ${NUM_PROCESSES:+--num_gpus "$NUM_PROCESSES"} \
  "$root/launch/distill.py" "$@"
