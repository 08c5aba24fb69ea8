#!/usr/bin/env bash
# Distil on all GPUs of this machine: launch/node.sh --config FILE [options of launch/distill.py]
#
# Rerun the same command to resume. To stop the run, create a file named STOP in the run folder.
#
# NUM_PROCESSES   number of ranks (default: one per GPU); about 2 on a machine without GPUs
# MASTER_PORT     port of the ranks' store (default: a free one)
#
# CUDA_VISIBLE_DEVICES=4,5 selects GPUs by their numbers.

set -euo pipefail
source "$(dirname "$0")/common.sh"
help_if_asked "$@"

MASTER_PORT=${MASTER_PORT:-$(free_port)}
export MASTER_PORT
gpus=()
[[ -z ${NUM_PROCESSES:-} ]] || choose_gpus "$NUM_PROCESSES"
run_deepspeed --quiet ${gpus[@]+"${gpus[@]}"} --master_port "$MASTER_PORT" \
  "$root/launch/distill.py" "$@"
