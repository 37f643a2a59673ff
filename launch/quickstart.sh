#!/usr/bin/env bash
# Set-up and main job, from a clean clone: trains the small net on 5,000 MNIST images that come
# with a package, evaluates it, and classifies a few images. OUT chooses where the results go.
. "$(dirname "$0")/setup.sh"
set_up requirements.txt
OUT="${OUT:-runs/quickstart}"

python -m launch.train --config=experiments/small.py --workdir="$OUT/small"
python -m launch.evaluate --workdir="$OUT/small"
python -m launch.sample --source=mnist_5k --count=6 --out="$OUT/images"
python -m launch.predict --workdir="$OUT/small" "$OUT"/images/*.png

cat <<EOF

Results:
  $OUT/small/curves.png      learning curves
  $OUT/small/metrics.jsonl   the numbers behind them
  $OUT/small/confusion.png   which digit is taken for which
  tensorboard --logdir $OUT  the same, live (pip install tensorboard)
EOF
