#!/usr/bin/env bash
# Distil on all GPUs of this machine: launch/node.sh --config FILE [options of launch/distill.py]
#
# The same command resumes. Stop it with a file named STOP in the run's folder.
#
# NUM_PROCESSES   ranks (default: one a GPU); 2 or so on a machine without GPUs
# MASTER_PORT     port of the ranks' store (default: a free one)

set -euo pipefail
source "$(dirname "$0")/common.sh"
help_if_asked "$@"

MASTER_PORT=${MASTER_PORT:-$(free_port)}
export MASTER_PORT
run_deepspeed --quiet ${NUM_PROCESSES:+--num_gpus "$NUM_PROCESSES"} --master_port "$MASTER_PORT" \
  "$root/launch/distill.py" "$@"
