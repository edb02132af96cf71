#!/usr/bin/env bash
# The Flickr8k experiment with native fusion: the same towers joined as VISTA joins its own, the recipes, the budget and the
# seeds of flickr8k.sh. Stage 1 once, then GCL and CL from it; the summary sets them beside the runs of results/flickr8k.
# A run whose results exist is not repeated. Usage: runs/flickr8k_vista.sh [SEED ...]
set -euo pipefail
seeds=("${@:-0}")
threads=${THREADS:-$(nproc)}
launch() { accelerate launch --num_cpu_threads_per_process "$threads" train.py "$@"; }

towers=build/vista-minilm-efficientnet-lite0-96
outputs=outputs/flickr8k_vista
[ -e $towers ] || gcl convert towers $towers --image-size 96 --vista
[ -e $outputs/stage1/model/results.json ] ||
  launch hub_configs/flickr8k_stage1.yaml --encoder $towers --fusion native --text_pooling encoder --output_dir $outputs/stage1
for seed in "${seeds[@]}"; do
  for loss in gcl cl; do
    out=$outputs/$loss-seed$seed
    [ -e "$out/model/results.json" ] ||
      launch "hub_configs/flickr8k_$loss.yaml" --encoder $outputs/stage1/model --seed "$seed" --output_dir "$out"
  done
done

runs=results/flickr8k_vista/runs sums=results/flickr8k/runs
mkdir -p $runs
cp $outputs/stage1/model/results.json $runs/stage1.json
arguments=("sum: stage 1 (CL)=$sums/stage1.json" "native: stage 1 (CL)=$runs/stage1.json")
for loss in cl gcl; do
  for seed in "${seeds[@]}"; do
    cp "$outputs/$loss-seed$seed/model/results.json" "$runs/$loss-seed$seed.json"
    arguments+=("sum: ${loss^^}=$sums/$loss-seed$seed.json" "native: ${loss^^}=$runs/$loss-seed$seed.json")
  done
done
gcl evaluate summary "${arguments[@]}" --out results/flickr8k_vista
gcl evaluate compare "$sums/gcl-seed${seeds[0]}.json" "$runs/gcl-seed${seeds[0]}.json" --labels "sum" "native" \
  --out results/flickr8k_vista
