#!/usr/bin/env bash
# The Flickr8k experiment: stage 1 once, then five losses from it, seed by seed, so that every seed is complete before
# the next begins; then GR-CLIP centring of stage 1, the summary and the comparison. A run whose results exist is not
# repeated. Usage: runs/flickr8k.sh [SEED ...]
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

stage1=outputs/flickr8k/stage1/model
centred=outputs/flickr8k/centred
test=data/flickr8k_test_1000_224q85.parquet
[ -e $centred/results.json ] ||
  gcl evaluate pairs $stage1 $test --variant centring --centre-on data/flickr8k_train_6000_160q85.parquet --out $centred

runs=results/flickr8k/runs
mkdir -p $runs
cp $stage1/results.json $runs/stage1.json
cp $centred/results.json $runs/centred.json
for loss in cl alignclip gcl_no_intra gcl gcl_without_other_positive; do
  for seed in "${seeds[@]}"; do
    cp "outputs/flickr8k/$loss-seed$seed/model/results.json" "$runs/$loss-seed$seed.json"
  done
done
arguments=("stage 1 (CL)=$runs/stage1.json" "stage 1, GR-CLIP centring=$runs/centred.json")
declare -A names=(
  [cl]="CL" [alignclip]="AlignCLIP-style" [gcl_no_intra]="GCL without intra-modality negatives" [gcl]="GCL (the paper)"
  [gcl_without_other_positive]="GCL without the other positive"
)
for loss in cl alignclip gcl_no_intra gcl gcl_without_other_positive; do
  for seed in "${seeds[@]}"; do arguments+=("${names[$loss]}=$runs/$loss-seed$seed.json"); done
done
gcl evaluate summary "${arguments[@]}" --out results/flickr8k
gcl evaluate compare $runs/stage1.json "$runs/gcl-seed${seeds[0]}.json" --labels "stage 1 (CL)" "GCL" --out results/flickr8k
