#!/usr/bin/env bash
# The fronts on photographs.  What is done is skipped, also on another machine; CURE_DATA names the
# folder that holds imagenette224/.  JOBS runs at a time, one thread each; a run takes 5 to 10 minutes.
set -euo pipefail
photos=$(cd "$(dirname "$0")/photos" && pwd)
cd "$CURE_DATA" # the settings in the records name no folder of one machine
cure front at trades cure act ard photos data.source=imagenette224 data.resize=64 \
  model.name=efficientnet_lite0 start=natural natural.epochs=4 natural.learning_rate=0.01 \
  training.epochs=8 training.validate_every=4 training.threads=1 data.augment.crop_padding=6 \
  data.augment.cutmix=0 --values at=0.0,0.25,0.5 --values trades=1,3 --values cure=0.25,0.5,2 \
  --values act=0.3,0.9 --values ard=0.5,1.0 --with ard:method.teacher=run:at-0.0 --seeds 0,1,2 \
  --folder "$photos/fronts" --output "$photos/fronts.json" --jobs "${JOBS:-2}"
