#!/usr/bin/env bash
# The studies on cifar10-mini (docs/studies.md).  What is done is skipped; CURE_DATA names the folder
# that holds cifar10/.  About three hours on two cores, most of it the training of `layerwise`.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
STUDIES=results/studies

# The networks of `make table`, seed 0: one natural start, then AT, TRADES and CURE from it.
cure table results/cifar10-mini/plan.yaml --only natural,at,trades,cure --seeds 0
NATURAL=runs/table/natural-seed0
ROBUST="runs/table/at-seed0 runs/table/trades-seed0 runs/table/cure-seed0"

study() { # NAME ARGUMENTS...: into results/studies/NAME.json, once
    [ -e "$STUDIES/$1.json" ] || cure analyse "$@" --output "$STUDIES/$1.json"
}

study prediction-flips $ROBUST
study cka $NATURAL $ROBUST --limit 2000
study minimal-perturbation $NATURAL $ROBUST --limit 500
study landscape $NATURAL $ROBUST

# 1,000 images and 40 epochs: robust overfitting within minutes.
cure table $STUDIES/overfitting/plan.yaml
study overfitting runs/overfitting/{at,trades,cure,U-1,U-34}-seed0 --limit 500

cure table $STUDIES/gradients/plan.yaml
study gradients runs/table/at-recorded-seed0 runs/table/cure-recorded-seed0

# All sets of blocks from the same natural start, which is not trained again; some of them as the
# released code has it.
SETTINGS="training.epochs=3 training.precision=bf16_attack training.threads=1 training.validate_every=5"
for form in layerwise layerwise-released; do
    mkdir -p runs/$form/training
    [ -e runs/$form/training/natural-seed0 ] || cp -r $NATURAL runs/$form/training/natural-seed0
done
cure analyse layerwise cifar10-mini $SETTINGS --output runs/layerwise
cp runs/layerwise/layerwise.json $STUDIES/
cure analyse layerwise cifar10-mini $SETTINGS --output runs/layerwise-released --sets 1,2,4,23 \
    --variants reinitialised --stem updated --statistics updated
cp runs/layerwise-released/layerwise.json $STUDIES/layerwise-released.json

# What p and gamma do, on few images.
cure analyse sensitivity cifar10-mini data.limit=1500 data.validation=500 natural.epochs=20 \
    training.epochs=8 method.revision.horizon=0.2 training.validate_every=2 \
    training.precision=bf16_attack training.threads=1 \
    --vary method.percent=10,30,50 --vary method.gamma=0.3,1,3 --grid 3 --output runs/sensitivity
cp runs/sensitivity/sensitivity.json $STUDIES/

# Drawings, and the figures in docs/studies.md.
python results/figures.py
