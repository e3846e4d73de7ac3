#!/usr/bin/env bash
# The baseline that ships for mean corruption errors: the naturally trained network of the table
# (`make table` trains it), under all corruptions and both kinds of frost.  Needs the photographs:
# pip install --no-deps imagecorruptions
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:-runs/table/natural-seed0}
limit=${2:-2000}
everything=$(cure list corruptions | cut -d ' ' -f 1 | paste -sd ,)
mkdir -p src/cure/evaluation/corruptions/baselines
cure corruptions "$run" --limit "$limit" --only "$everything" \
  --output src/cure/evaluation/corruptions/baselines/cifar10-mini-natural.json
