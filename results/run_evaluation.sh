#!/usr/bin/env bash
# The whole evaluation of a natural, an AT and a CURE network of the table (`make table` trains them)
# and of the ResNet-18 that comes with pyautoattack: attacks, diagnosis, corruptions, and whether other
# libraries' attacks decide alike.  What is there is skipped.  About half an hour of one core.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-runs/table}
limit=${2:-300}
out=results/evaluation
mkdir -p $out
once() { [ -e "$out/$1.json" ] || "${@:2}" --output "$out/$1.json" || [ -e "$out/$1.json" ]; }
suite=natural,fgsm,pgd20,pgd100,pgd50:restarts=5,cw,autoattack,fmn,deepfool,noise,transfer
for name in natural at cure; do
  run=$runs/$name-seed0
  once $name-diagnosis cure diagnose "$run" --limit 200
  once $name-suite cure evaluate "$run" --limit "$limit" --attacks $suite --curve pgd20 \
    --transfer "$runs/trades-seed0"
  once $name-corruptions cure corruptions "$run" --limit 500
done
weights=$(python -c "import pathlib, pyautoattack as p; print(pathlib.Path(p.__file__).parent / 'examples/model_test.pt')")
model=(--model resnet18 --weights "$weights" --data cifar10)
once resnet18-diagnosis cure diagnose "${model[@]}" --limit 50
once resnet18-suite cure evaluate "${model[@]}" --limit 50 \
  --attacks natural,fgsm,pgd20,pgd100,cw,autoattack,fmn,deepfool,noise,transfer \
  --curve pgd20 --transfer "$runs/trades-seed0"
once resnet18-corruptions cure corruptions "${model[@]}" --limit 200 --severity 3
[ -e $out/agreement.json ] || python results/agreement.py "$runs"/{natural,at,cure}-seed0 --output $out/agreement.json
