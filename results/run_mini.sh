#!/usr/bin/env bash
# The figures of results/cifar10-mini-cure: train by the recipe, evaluate the natural start and CURE.
# Usage: results/run_mini.sh [SEED ...].  What is done is skipped and what was stopped goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
out=results/cifar10-mini-cure
mkdir -p $out
for seed in "${@:-0}"; do
  run=runs/cifar10-mini-seed$seed
  if [ -e "$run" ]; then cure resume "$run"; else
    cure train cifar10-mini "seed=$seed" training.threads=2 --run "$run"
  fi
  for part in natural cure; do
    target=$run; [ $part = cure ] || target=$run/natural
    python results/curves.py "$target" "$seed" "$part" $out/curves.csv
    [ -e "$out/seed$seed-$part.json" ] ||
      cure evaluate "$target" --attacks natural,pgd20,cw --output "$out/seed$seed-$part.json"
    [ -e "$out/seed$seed-$part-autoattack.json" ] ||
      cure evaluate "$target" --attacks natural,autoattack --limit 500 \
        --output "$out/seed$seed-$part-autoattack.json"
  done
done
python results/figures.py
