#!/usr/bin/env bash
# A third party's naturally trained CIFAR-10 ResNet-18, which comes with pyautoattack: evaluated as any
# user's model, then 20 steps of CURE from it.  About 15 minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
out=results/third-party
mkdir -p $out
weights=$(python -c "import pathlib, pyautoattack as p; print(pathlib.Path(p.__file__).parent / 'examples/model_test.pt')")
evaluate() { [ -e "$out/$1.json" ] || cure evaluate "${@:2}" --output "$out/$1.json"; }
model=(--model resnet18 --weights "$weights" --data cifar10)
evaluate natural "${model[@]}" --limit 2000 --attacks natural
evaluate natural-attacked "${model[@]}" --limit 500 --attacks natural,pgd20,cw
run=runs/third-party-20-steps
# (1380 - 100) / 64 = 20 steps in one epoch
[ -e $run ] || cure train finetune data.source=cifar10 data.limit=1380 data.validation=100 \
  model.name=resnet18 "start=$weights" training.epochs=1 training.threads=2 \
  method.revision.horizon=0.5 name=third-party --run $run
evaluate 20-steps $run --checkpoint last --limit 500 --attacks natural,pgd20
