#!/usr/bin/env bash
# Distil on one GPU: launch/single_gpu.sh [options of launch/distill.py]
#
# The default configuration is configs/large_to_l6_a6000.json (for a 48 GB card, with the optimizer
# state in host memory); --config names another. CUDA_VISIBLE_DEVICES=1 selects the second GPU.
# Rerun the same command to resume.
#
# MASTER_PORT   port of the ranks' store (default: a free one)

set -euo pipefail
source "$(dirname "$0")/common.sh"
help_if_asked "$@"

MASTER_PORT=${MASTER_PORT:-$(free_port)}
export MASTER_PORT
choose_gpus 1
run_deepspeed --quiet "${gpus[@]}" --master_port "$MASTER_PORT" "$root/launch/distill.py" \
  --config "$root/configs/large_to_l6_a6000.json" "$@"
