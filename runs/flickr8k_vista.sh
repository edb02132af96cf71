#!/usr/bin/env bash
# Flickr8k with native fusion: does GCL also help where the backbone itself fuses image and text?
#
#   runs/flickr8k_vista.sh [SEED ...]  default: seed 0; results/flickr8k_vista was made with 0 1 2
#
# The towers are those of runs/flickr8k.sh, joined the way VISTA joins its own: image tokens pass through the text tower.
# Recipes, budget and seeds are the same. Stage 1 runs once, then GCL and CL go on from it. The summary shows these runs
# next to those of results/flickr8k (fusion by sum). A run whose results.json exists is not repeated.
set -euo pipefail
seeds=("${@:-0}")
towers=build/vista-minilm-efficientnet-lite0-96
out=outputs/flickr8k_vista
results=results/flickr8k_vista
runs=$results/runs
sums=results/flickr8k/runs

# --- stage 1
[ -e $towers ] || gcl convert towers $towers --image-size 96 --vista
[ -e $out/stage1/model/results.json ] ||
  gcl train hub_configs/flickr8k_stage1.yaml --output_dir $out/stage1 \
    --encoder $towers --fusion native --text_pooling encoder

# --- stage 2
for seed in "${seeds[@]}"; do
  for loss in gcl cl; do
    folder=$out/$loss-seed$seed
    [ -e "$folder/model/results.json" ] ||
      gcl train hub_configs/flickr8k_stage2.yaml --loss $loss --seed "$seed" --output_dir "$folder" \
        --encoder $out/stage1/model
  done
done

# --- tables and pictures
mkdir -p $runs
cp $out/stage1/model/results.json $runs/stage1.json
rows=("sum: stage 1 (CL)=$sums/stage1.json" "native: stage 1 (CL)=$runs/stage1.json")
for loss in cl gcl; do
  for seed in "${seeds[@]}"; do
    cp "$out/$loss-seed$seed/model/results.json" "$runs/$loss-seed$seed.json"
    rows+=("sum: ${loss^^}=$sums/$loss-seed$seed.json" "native: ${loss^^}=$runs/$loss-seed$seed.json")
  done
done
gcl evaluate summary "${rows[@]}" --out $results
gcl evaluate compare "$sums/gcl-seed${seeds[0]}.json" "$runs/gcl-seed${seeds[0]}.json" \
  --labels "sum" "native" --out $results
