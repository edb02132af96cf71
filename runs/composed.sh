#!/usr/bin/env bash
# Composed retrieval and mixed pools on real data, with the checkpoints of Flickr8k.
#
#   runs/composed.sh
#
# Two data sets in M-BEIR's layout share one global pool of images, texts and fused rows: Flickr8k's test pairs, and
# products with queries such as "the same in blue instead of pink". The checkpoints are those of runs/flickr8k.sh and
# runs/flickr8k_vista.sh with seed 0, which must have run before. The script writes results/composed. A measurement whose
# results.json exists is not repeated.
set -euo pipefail
root=build/composed
train=data/flickr8k_train_6000_160q85.parquet

# --- data
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

# --- stage 1 as it is, centred and with other fusions; then CL and GCL
declare -A fusions=([flickr8k]="sum" [flickr8k_vista]="sum normalized_sum") # other than the checkpoint's own
for experiment in flickr8k flickr8k_vista; do
  stage1=outputs/$experiment/stage1/model
  columns=()
  measure "$experiment-stage1" $stage1
  columns+=("stage 1 (CL)=outputs/composed/$experiment-stage1")
  measure "$experiment-stage1-centring" $stage1 --variant centring --centre-on $train
  columns+=("centring=outputs/composed/$experiment-stage1-centring")
  for fusion in ${fusions[$experiment]}; do
    measure "$experiment-stage1-$fusion" $stage1 --variant "$fusion"
    columns+=("$fusion=outputs/composed/$experiment-stage1-$fusion")
  done
  for loss in cl gcl; do
    measure "$experiment-$loss" "outputs/$experiment/$loss-seed0/model"
    columns+=("${loss^^}=outputs/composed/$experiment-$loss")
  done
  gcl evaluate compare "${columns[@]}" --out "results/composed/$experiment"
done
