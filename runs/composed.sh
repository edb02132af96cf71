#!/usr/bin/env bash
# Composed retrieval and mixed pools on real data: Flickr8k's test pairs and products with "the same in blue instead of
# pink" queries, in M-BEIR's layout and with one global pool of images, texts and fused rows. The checkpoints are those
# of runs/flickr8k.sh and runs/flickr8k_vista.sh with seed 0, which run before. What exists is not repeated.
# Usage: runs/composed.sh
set -euo pipefail
root=build/composed
train=data/flickr8k_train_6000_160q85.parquet
[ -e $root/query/test/mbeir_flickr8k_task0_test.jsonl ] ||
  gcl convert mbeir data/flickr8k_test_1000_224q85.parquet $root --name flickr8k --dataset-id 10
[ -e $root/query/test/mbeir_fashion_task7_test.jsonl ] ||
  gcl convert mbeir data/fashion_5000_60x80q90.parquet $root --name fashion --dataset-id 11 \
    --composed data/fashion_composed_queries.jsonl

# measure NAME MODEL [OPTION ...]
measure() {
  local out=outputs/composed/$1
  [ -e "$out/results.json" ] || gcl evaluate mbeir "$2" --root $root --out "$out" "${@:3}"
  mkdir -p results/composed/runs
  cp "$out/results.json" "results/composed/runs/$1.json"
}

declare -A fusions=([flickr8k]="sum" [flickr8k_vista]="sum normalized_sum") # those that are not the checkpoint's own
for experiment in flickr8k flickr8k_vista; do
  stage1=outputs/$experiment/stage1/model
  measure "$experiment-stage1" $stage1
  for loss in cl gcl; do
    measure "$experiment-$loss" "outputs/$experiment/$loss-seed0/model"
  done
  measure "$experiment-stage1-centring" $stage1 --variant centring --centre-on $train
  for fusion in ${fusions[$experiment]}; do
    measure "$experiment-stage1-$fusion" $stage1 --variant "$fusion"
  done
  results=(
    "stage 1 (CL)=outputs/composed/$experiment-stage1"
    "centring=outputs/composed/$experiment-stage1-centring"
  )
  for fusion in ${fusions[$experiment]}; do
    results+=("$fusion=outputs/composed/$experiment-stage1-$fusion")
  done
  results+=("CL=outputs/composed/$experiment-cl" "GCL=outputs/composed/$experiment-gcl")
  gcl evaluate compare "${results[@]}" --out "results/composed/$experiment"
done
