#!/usr/bin/env bash
# Set-up and main job, from a clean clone, on data and weights that come with Python packages:
# what each regularizer buys on 500 digits, and what ImageNet pretraining buys on 200.
# OUT chooses where the results go (default runs/quickstart). Killed? Run it again: it resumes.
. "$(dirname "$0")/setup.sh"
set_up requirements.txt
OUT="${OUT:-runs/quickstart}"

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

say "1. What does each regularizer buy? A small net on 500 digits: 5 arms, tuned, 6 replicates"
python -m launch.ablate --config=experiments/regularization.py --workdir="$OUT/regularization" --seeds=6

say "2. What is pretraining worth? Frozen VGG16 on 200 digits 4 and 9, random or ImageNet's"
python -m launch.ablate --config=experiments/finetune_digits.py --workdir="$OUT/pretraining"

say "3. Is it a 4 or a 9?"
python -m launch.train --config=experiments/finetune_digits.py --workdir="$OUT/imagenet"
python -m launch.sample --source=mnist_5k --classes=4,9 --count=6 --out="$OUT/images"
python -m launch.predict --workdir="$OUT/imagenet" "$OUT"/images/*.png

say "Results"
python - "$OUT" <<'END'
import json, pathlib, sys

out = pathlib.Path(sys.argv[1])
for study in 'regularization', 'pretraining':
    summary = json.loads((out / study / 'summary.json').read_text())
    print(f'  {study}')
    for name, arm in summary['arms'].items():
        accuracy, loss = (arm['test'][measure]['mean'] for measure in ('accuracy', 'loss'))
        verdicts = [arm['compared'].get(measure, {}).get('verdict') for measure in ('accuracy', 'loss')]
        first = f'test accuracy {accuracy:.1%} {verdicts[0] or "(baseline)"}'
        second = f'loss {loss:.3f} nats {verdicts[1] or ""}'
        print(f'    {name:<14} {first:<31} {second}')
    if pixels := summary['floor']['accuracy']:
        print(f'    {"SVM on pixels":<14} test accuracy {pixels["mean"]:.1%}')
print(f"""
  {out}/regularization/report.html   open it in a browser: verdicts, figures, how to reproduce
  {out}/pretraining/report.html      the same of VGG16
  {out}/imagenet/curves.png          learning curves of the fine-tuning""")
END
