#!/usr/bin/env bash
# Flickr8k: what GCL gains over CL, and which part of it.
#
#   runs/flickr8k.sh [SEED ...]        default: seed 0; results/flickr8k was made with 0 1 2
#
# Stage 1 trains two pretrained towers with CL. Stage 2 goes on from it with five losses on the same budget. GR-CLIP
# centring of stage 1 is the rival that needs no training. The script then writes summary and comparison to
# results/flickr8k. A run whose results.json exists is not repeated, and every seed is complete before the next begins.
set -euo pipefail
seeds=("${@:-0}")
towers=build/minilm-efficientnet-lite0-96
out=outputs/flickr8k
results=results/flickr8k
runs=$results/runs

# what each run of stage 2 adds to hub_configs/flickr8k_stage2.yaml, and its name in the tables
declare -A options=(
  [gcl]=""
  [cl]="--loss cl"
  [alignclip]="--loss alignclip"
  [gcl_no_intra]="--intra_modality false"
  [gcl_without_other_positive]="--denominator without_other_positive"
)
declare -A names=(
  [gcl]="GCL (the paper)"
  [cl]="CL"
  [alignclip]="AlignCLIP-style"
  [gcl_no_intra]="GCL without intra-modality negatives"
  [gcl_without_other_positive]="GCL without the other positive"
)

# --- stage 1
[ -e $towers ] || gcl convert towers $towers --image-size 96
[ -e $out/stage1/model/results.json ] || gcl train hub_configs/flickr8k_stage1.yaml

# --- stage 2
for seed in "${seeds[@]}"; do
  for run in gcl cl gcl_without_other_positive gcl_no_intra alignclip; do
    folder=$out/$run-seed$seed
    # shellcheck disable=SC2086  # the options are words
    [ -e "$folder/model/results.json" ] ||
      gcl train hub_configs/flickr8k_stage2.yaml ${options[$run]} --seed "$seed" --output_dir "$folder"
  done
done

# --- centring of stage 1, with the mean embeddings of the training pairs
[ -e $out/centred/results.json ] ||
  gcl evaluate pairs $out/stage1/model data/flickr8k_test_1000_224q85.parquet \
    --variant centring --centre-on data/flickr8k_train_6000_160q85.parquet --out $out/centred

# --- tables and pictures
mkdir -p $runs
cp $out/stage1/model/results.json $runs/stage1.json
cp $out/centred/results.json $runs/centred.json
rows=("stage 1 (CL)=$runs/stage1.json" "stage 1, GR-CLIP centring=$runs/centred.json")
for run in cl alignclip gcl_no_intra gcl gcl_without_other_positive; do
  for seed in "${seeds[@]}"; do
    cp "$out/$run-seed$seed/model/results.json" "$runs/$run-seed$seed.json"
    rows+=("${names[$run]}=$runs/$run-seed$seed.json")
  done
done
gcl evaluate summary "${rows[@]}" --out $results
gcl evaluate compare $runs/stage1.json "$runs/gcl-seed${seeds[0]}.json" --labels "stage 1 (CL)" "GCL" --out $results
