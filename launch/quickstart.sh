#!/usr/bin/env bash
# Set-up and main job, from a clean clone, on data and weights that come with Python packages:
# what each regularizer buys on 500 digits, and what ImageNet pretraining buys on 200.
# OUT chooses where the results go (default runs/quickstart). Killed? Run it again: it resumes.
. "$(dirname "$0")/setup.sh"
set_up requirements.txt
OUT="${OUT:-runs/quickstart}"

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

say "1. What does each regularizer buy? A small net on 500 digits, 5 arms, 5 seeds"
python -m launch.ablate --config=experiments/regularization.py --workdir="$OUT/regularization"

say "2. Frozen VGG16 on 200 digits 4 and 9: ImageNet's convolutions against random ones"
for weights in imagenet random; do
  python -m launch.train --config=experiments/finetune_digits.py \
    --config.model.weights="$weights" --workdir="$OUT/$weights"
  python -m launch.evaluate --workdir="$OUT/$weights" > /dev/null
done

say "3. Is it a 4 or a 9?"
python -m launch.sample --source=mnist_5k --classes=4,9 --count=6 --out="$OUT/images"
python -m launch.predict --workdir="$OUT/imagenet" "$OUT"/images/*.png

say "Results"
python - "$OUT" <<'END'
import json, pathlib, sys

out = pathlib.Path(sys.argv[1])
ablation = json.loads((out / 'regularization' / 'summary.json').read_text())
for name, arm in ablation['arms'].items():
    verdict = arm['verdict']['kind'] if arm['verdict'] else 'the baseline'
    print(f"  small net, {name:<32} test accuracy {arm['eval']['accuracy']['mean']:.1%}  {verdict}")
for name in 'imagenet', 'random':
    accuracy = json.loads((out / name / 'evaluation.json').read_text())['accuracy']
    print(f'  VGG16 head, 4 or 9, {name:<23} test accuracy {accuracy:.1%}')
print(f"""
  {out}/regularization/report.html   open it in a browser: verdicts, figures, how to reproduce
  {out}/imagenet/curves.png          learning curves of the fine-tuning
  {out}/imagenet/metrics.jsonl       the numbers behind them""")
END
