#!/usr/bin/env bash
# The Flickr8k experiment: stage 1 once, then five losses from it, seed by seed, so that every seed is complete before
# the next begins. A run whose results exist is not repeated. Usage: hub_configs/flickr8k.sh [SEED ...]
set -euo pipefail
seeds=("${@:-0}")
threads=${THREADS:-$(nproc)}
launch() { accelerate launch --num_cpu_threads_per_process "$threads" train.py "$@"; }

[ -e build/minilm-efficientnet-lite0-96 ] || gcl convert towers build/minilm-efficientnet-lite0-96 --image-size 96
[ -e outputs/flickr8k/stage1/model/results.json ] || launch hub_configs/flickr8k_stage1.yaml
for seed in "${seeds[@]}"; do
  for loss in gcl cl gcl_without_other_positive gcl_no_intra alignclip; do
    out=outputs/flickr8k/$loss-seed$seed
    [ -e "$out/model/results.json" ] || launch "hub_configs/flickr8k_$loss.yaml" --seed "$seed" --output_dir "$out"
  done
done
