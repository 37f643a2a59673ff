"""Compare the bits that two commits compute, side by side on one machine.

  python -m tests.golden --base COMMIT --cache /tmp/golden   # against this checkout's files
  python -m tests.golden --base COMMIT --head COMMIT --only strided,sam

Both sides run the tiny runs below by the launchers, with one interpreter. Compared are

- state: of the last checkpoint, the bytes of each parameter and batch statistic by its path, and
  of the rest (averages, anchors, optimizer), whose layout may change, those of all float arrays;
- metrics: every number in metrics.jsonl or in an ablation's cells, but times (new ones are fine);
- steps: objective and gradient norm of each step, if both sides write steps.f32.

Exit code 1 if a bit differs or a run fails. Nothing here imports the package: its modules move;
flags, config keys and work directories do not.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

ROOT = Path(__file__).resolve().parents[1]

# 5 epochs of 10 steps. A cut VGG16 with random weights takes as long as the small net.
ALL = (
    'seed=3 data.source=digits data.train=train[:200] data.eval=test[:100] data.batch=20 '
    'train.epochs=5 train.threads=1 '
)
NET = 'model.stem_width=0 model.widths=(4,8) model.hidden=(16,) optimizer.learning_rate=3e-3'
VGG = (
    'model.name=vgg16 model.cut=block2_pool model.hidden=(16,) model.head_norm=none data.size=32 '
    "data.resize=stretch data.channels=3 optimizer.name=sgd train.frozen=('backbone/*',)"
)
TWO = 'train.epochs=3 unfreeze.epochs=2 unfreeze.frozen'
CONFIGS = {
    'strided': 'model.stem_width=8 model.stem_kernel=3 model.stem_stride=1 loss.l2=5e-4 '
    'optimizer.schedule=inverse_time optimizer.decay_rate=1e-4',
    'vgg': VGG,
    'vgg images': f'{VGG} augment.flip=true features.cache=never',
    'two phases': f"{VGG} {TWO}=('backbone/block1*',) loss.l2_sp=1e-2 unfreeze.depth_decay=0.5",
    'thawed': f"{NET} train.frozen=('block1*',) {TWO}=() optimizer.momentum=0.8 train.ema=0.9",
    'sam': f'{NET} optimizer.sam=0.05',
    'ema': f'{NET} train.ema=0.9 optimizer.name=adamw optimizer.weight_decay=1e-2',
    'swa': f'{NET} train.swa_from=2 train.precise_norm=4 optimizer.name=sgd',
    'mixup': f'{NET} augment.mixup=0.2 augment.cutmix=0.5 loss.label_smoothing=0.1',
    'augment': f'{NET} augment.crop=1 augment.erasing=0.5 augment.randaugment=9 augment.cutout=2',
    'ghost norm': f'{NET} model.norm=ghost model.head_norm=renorm model.ghost_batch=5',
    'accumulate': f'{NET} optimizer.accumulate=2 optimizer.schedule=cosine',
    'bfloat16': f'{NET} model.dtype=bfloat16',
    'penalties': f'{NET} loss.l2=1e-3 loss.l1=1e-4 loss.orthogonality=1e-3 loss.l2_sp=1e-2 '
    'loss.confidence_penalty=0.1 optimizer.max_norm=1 optimizer.gradient_noise=1e-3 '
    'optimizer.clip_norm=1',
    'noise': f'{NET} model.residual=true model.stochastic_depth=0.2 model.drop_kind=block '
    'model.drop_block=3 model.drop_ramp=0.5 model.input_noise=0.1 model.norm=group '
    'model.norm_groups=2 model.weight_standardization=true',
    'patience': f'{NET} train.patience=1 train.precise_norm=4 optimizer.learning_rate=0.3',
    'streaming': f'{NET} data.stream=always',
    'devices': NET,
    'fsdp': f'{NET} model.widths=(16,) model.hidden=(1024,1024) --fsdp',
    'ablation': f'{NET} --workers=1',
    'ablation patience': f'{NET} train.patience=1 train.precise_norm=4 train.ema=0.9 '
    'optimizer.learning_rate=0.3 --workers=1',
    'ablation together': f'{NET} --workers=1 --together=2',
}
FOUR_DEVICES = 'devices', 'fsdp'
EXPERIMENT = """
from cnn_jax.config import Config as get_config

ARMS = {'dropout': {}, 'none': {'model.dropout': 0.0, 'loss.l2': 1e-3}}
"""
NO_RESULTS = ('second', 'time', 'speed', 'sha256', 'digest', 'compilations')  # parts of their names


def run(name: str, checkout: Path, compiled: Path) -> dict:
    """What a config computes in a checkout: `state`, `metrics`, `steps`; or an `error`."""
    with tempfile.TemporaryDirectory(prefix='golden-') as place:
        experiment, folder = Path(place, 'experiment.py'), Path(place, 'run')
        experiment.write_text(EXPERIMENT)
        study = name.startswith('ablation')
        line = [sys.executable, '-m', 'launch.ablate' if study else 'launch.train']
        line += [f'--config={experiment}', f'--workdir={folder}', *['--seeds=2'] * study]
        words = (ALL + CONFIGS[name]).split()
        line += [word if word.startswith('--') else f'--config.{word}' for word in words]
        own = {'CNN_JAX_CACHE': f'{place}/cache', 'JAX_COMPILATION_CACHE_DIR': str(compiled)}
        own |= {'CNN_JAX_NATIVE': f'{compiled}/native'}
        own |= {'JAX_PLATFORMS': 'cpu', 'PYTHONDONTWRITEBYTECODE': '1', 'PYTHONPATH': ''}
        if name in FOUR_DEVICES:
            own['XLA_FLAGS'] = '--xla_force_host_platform_device_count=4'
        env = os.environ | own
        done = subprocess.run(line, cwd=checkout, env=env, capture_output=True, text=True)
        if done.returncode:
            return {'error': f'exit code {done.returncode}: {(done.stdout + done.stderr)[-800:]}'}
        if study:
            cells = [json.loads(path.read_text()) for path in folder.glob('cells/*.json')]
            return {'metrics': sorted(cells, key=lambda cell: (cell['arm'], cell['seed']))}
        lines = (folder / 'metrics.jsonl').read_text().splitlines()
        record = {'state': read_state(folder), 'metrics': [json.loads(line) for line in lines]}
        if (folder / 'steps.f32').exists():
            record['steps'] = [(folder / 'steps.f32').read_bytes().hex()]
        return record


def read_state(folder: Path) -> dict:
    """SHA-256 of the arrays of the newest checkpoint: `named` by their paths, `rest` without."""
    newest = max(folder.glob('checkpoints/step_*'), key=lambda path: int(path.name[5:]))
    place = next(newest.rglob('_METADATA')).parent
    with ocp.PyTreeCheckpointer() as checkpointer:
        shapes = checkpointer.metadata(place).item_metadata.tree
        arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        state = checkpointer.restore(place, restore_args=arrays)
    named, rest = {}, []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        array = np.asarray(leaf)
        content = f'{array.dtype}{array.shape}'.encode() + array.tobytes()
        if name.startswith(('params/', 'batch_stats/')):
            named[name] = hashlib.sha256(content).hexdigest()
        elif array.ndim and not np.issubdtype(array.dtype, np.integer):
            rest.append(hashlib.sha256(content).hexdigest())
    return {'named': named, 'rest': sorted(rest)}


def within(base, head) -> bool:
    """Whether the head holds all that the base does, times apart."""
    if isinstance(base, dict) and isinstance(head, dict):
        keys = [key for key in base if not any(word in key for word in NO_RESULTS)]
        return all(key in head and within(base[key], head[key]) for key in keys)
    if isinstance(base, list) and isinstance(head, list):
        return len(base) == len(head) and all(map(within, base, head))
    return base == head or (base != base and head != head)  # NaN


def results(commit: str, names: list[str], cache: Path) -> dict[str, dict]:
    """What a commit, or `worktree`, computes for each name; a commit's are kept in the cache."""
    cpu = [x for x in Path('/proc/cpuinfo').read_text().splitlines() if x.startswith('model name')]
    found = {}
    with tempfile.TemporaryDirectory(prefix='golden-') as place:
        archive = b''
        if commit != 'worktree':
            archive = subprocess.check_output(['git', '-C', str(ROOT), 'archive', commit])
            subprocess.run(['tar', 'x', '-C', place], input=archive, check=True)
        for name in names:
            facts = [
                archive,
                ALL,
                CONFIGS[name],
                EXPERIMENT,
                sys.version,
                version('jaxlib'),
                cpu[0],
            ]
            kept = cache / f'{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.json'
            if archive and kept.exists():
                found[name] = json.loads(kept.read_text())
                continue
            found[name] = run(name, Path(place) if archive else ROOT, cache / 'compiled')
            print(f'{commit} {name}: {found[name].get("error", "done")}', flush=True)
            if archive and 'error' not in found[name]:
                kept.write_text(json.dumps(found[name]))
    return found


def main() -> int:
    """Run both sides and print the table; returns the exit code."""
    logging.set_verbosity(logging.FATAL)  # Orbax's warnings
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument('--base', required=True)
    parser.add_argument('--head', default='worktree')
    parser.add_argument('--only', default=','.join(CONFIGS), help='names of configs, by commas')
    parser.add_argument('--cache', type=Path, help='folder of what commits computed')
    options = parser.parse_args()
    names, failed = options.only.split(','), False
    if unknown := set(names) - set(CONFIGS):
        parser.error(f'no config {", ".join(unknown)}; there are {", ".join(CONFIGS)}')
    with tempfile.TemporaryDirectory(prefix='golden-') as place:
        cache = options.cache or Path(place)
        cache.mkdir(parents=True, exist_ok=True)
        base, head = (results(side, names, cache) for side in (options.base, options.head))
    print(f'{"config":20} {"state":10} {"metrics":10} steps')
    for name in names:
        cells = []
        for part in ('state', 'metrics', 'steps'):
            there = part in base[name] and part in head[name]
            equal = there and within(base[name][part], head[name][part])
            cells.append('same' if equal else 'DIFFERENT' if there else '-')
        failed |= 'DIFFERENT' in cells or 'same' not in cells
        print(f'{name:20} {cells[0]:10} {cells[1]:10} {cells[2]}')
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
