"""Export a trained network as StableHLO and safetensors, or as ONNX, usable without this package.

  python -m launch.export --workdir=runs/small --out=exported
  python -m launch.export --workdir=runs/small --out=exported --checkpoint=best
  .onnx/bin/python -m launch.export --workdir=runs/small --out=exported --format=onnx

The folder holds model.stablehlo (the program, for any batch size, on CPU, NVIDIA GPU and TPU),
weights.safetensors, classes.json and a README.md whose code uses them with JAX, safetensors, NumPy
and Pillow, also as a server. Averaged weights are exported where the run has them. A folder that is
not empty is refused.

With --format=onnx, model.onnx replaces the first two; its output is checked against ONNX Runtime's.
The converter needs an environment of its own:

  python3 -m venv .onnx
  .onnx/bin/pip install -r requirements-onnx.txt
"""

from pathlib import Path

from absl import flags

from cnn_jax import runtime
from launch import cli

WORKDIR = cli.define_workdir('Folder of a run of launch.train, or its gs:// URL.', url=True)
OUT = cli.define_path('out', 'Folder to create.', required=True)
FORMAT = flags.DEFINE_enum(
    'format', 'stablehlo', ['stablehlo', 'onnx'], 'What to export to (onnx: requirements-onnx.txt).'
)
CHECKPOINT = cli.define_checkpoint()


def main(_) -> int:
    """Export; returns the exit code."""
    runtime.configure()  # before JAX is imported

    from cnn_jax.tools import export
    from cnn_jax.train.run import load_run

    run, out = load_run(WORKDIR.value, CHECKPOINT.value), Path(OUT.value)
    export.export(run, out, FORMAT.value)
    print(f'{out}: {", ".join(sorted(path.name for path in out.iterdir()))}; see {out}/README.md')
    return cli.OK


if __name__ == '__main__':
    cli.run(main)
