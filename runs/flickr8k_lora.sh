#!/usr/bin/env bash
# Flickr8k: is LoRA as good as training all weights, and what do the gates of the fusion alone gain?
#
#   runs/flickr8k_lora.sh [SEED ...]   default: seed 0; results/flickr8k_lora was made with 0 1 2
#
# All three start from the stage 1 of runs/flickr8k.sh, which must have run before. The learning rates are tried first,
# for 20 steps each, on 300 pairs of the development set; the recipes hold the best ones. The script then writes the
# summary to results/flickr8k_lora. A run whose results.json exists is not repeated.
set -euo pipefail
seeds=("${@:-0}")
out=outputs/flickr8k_lora
results=results/flickr8k_lora
runs=$results/runs

declare -A recipes=([full]=flickr8k_stage2 [lora]=flickr8k_lora [fusion]=flickr8k_fusion)
declare -A names=([full]="all weights" [lora]="LoRA" [fusion]="gates of the fusion")
mkdir -p $runs

# --- learning rates: METHOD-RATE
on_dev=(--data.eval.path data/flickr8k_dev_1000_224q85.parquet --data.eval.limit 300 --max_steps 20)
for trial in full-1e-4 full-3e-4 lora-3e-4 lora-1e-3 lora-3e-3 fusion-1e-3 fusion-1e-2; do
  folder=$out/dev/$trial
  [ -e "$folder/model/results.json" ] ||
    gcl train "hub_configs/${recipes[${trial%%-*}]}.yaml" "${on_dev[@]}" \
      --learning_rate "${trial#*-}" --output_dir "$folder"
  cp "$folder/model/results.json" "$runs/dev-$trial.json"
done

# --- the runs that count
rows=("stage 1=results/flickr8k/runs/stage1.json")
for method in full lora fusion; do
  for seed in "${seeds[@]}"; do
    folder=$out/$method-seed$seed
    [ -e "$folder/model/results.json" ] ||
      gcl train "hub_configs/${recipes[$method]}.yaml" --seed "$seed" --output_dir "$folder"
    cp "$folder/model/results.json" "$runs/$method-seed$seed.json"
    rows+=("${names[$method]}=$runs/$method-seed$seed.json")
  done
done
gcl evaluate summary "${rows[@]}" --out $results
