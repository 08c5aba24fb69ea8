#!/usr/bin/env bash
# Distil on one GPU: launch/single_gpu.sh [options of launch/distill.py]
#
# Takes configs/large_to_l6_a6000.json (a 48 GB card, the optimizer's state in host memory) unless --config names
# another. The same command resumes. CUDA_VISIBLE_DEVICES=1 takes another GPU than the first.
#
# MASTER_PORT   port of the ranks' store (default: a free one)

set -euo pipefail
source "$(dirname "$0")/common.sh"
help_if_asked "$@"

MASTER_PORT=${MASTER_PORT:-$(free_port)}
export MASTER_PORT
run_deepspeed --quiet --num_gpus 1 --master_port "$MASTER_PORT" "$root/launch/distill.py" \
  --config "$root/configs/large_to_l6_a6000.json" "$@"
