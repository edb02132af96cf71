#!/usr/bin/env bash
# Stage 2 of the Flickr8k experiment in three ways, from the stage 1 of flickr8k.sh: all weights, LoRA, the fusion's gates
# alone; before it their learning rates, tried for 20 steps and on the first 300 pairs of the development set.
# A run whose results exist is not repeated. Usage: runs/flickr8k_lora.sh [SEED ...]
set -euo pipefail
seeds=("${@:-0}")
threads=${THREADS:-$(nproc)}
launch() { accelerate launch --num_cpu_threads_per_process "$threads" train.py "$@"; }
out=outputs/flickr8k_lora
runs=results/flickr8k_lora/runs
mkdir -p $runs

declare -A recipes=([full]=flickr8k_gcl [lora]=flickr8k_lora [fusion]=flickr8k_fusion)
dev="--data.eval.path data/flickr8k_dev_1000_224q85.parquet --data.eval.limit 300 --max_steps 20"
for trial in full-1e-4 full-3e-4 lora-3e-4 lora-1e-3 lora-3e-3 fusion-1e-3 fusion-1e-2; do
  method=${trial%%-*}
  [ -e $out/dev/$trial/model/results.json ] ||
    launch hub_configs/${recipes[$method]}.yaml --learning_rate ${trial#*-} --output_dir $out/dev/$trial $dev
  cp $out/dev/$trial/model/results.json $runs/dev-$trial.json
done

declare -A names=([full]="all weights" [lora]="LoRA" [fusion]="gates of the fusion")
for seed in "${seeds[@]}"; do
  for method in full lora fusion; do
    folder=$out/$method-seed$seed
    [ -e $folder/model/results.json ] ||
      launch hub_configs/${recipes[$method]}.yaml --seed "$seed" --output_dir $folder
    cp $folder/model/results.json $runs/$method-seed$seed.json
  done
done
arguments=("stage 1=results/flickr8k/runs/stage1.json")
for method in full lora fusion; do
  for seed in "${seeds[@]}"; do arguments+=("${names[$method]}=$runs/$method-seed$seed.json"); done
done
gcl evaluate summary "${arguments[@]}" --out results/flickr8k_lora
