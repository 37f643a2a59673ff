#!/usr/bin/env bash
# An ablation as a Slurm job array. From the checkout, after launch/quickstart.sh or launch/test.sh
# has made .venv on the file system that the nodes share:
#
#   sbatch --array=0-15 launch/slurm_ablation.sh --config=experiments/regularization.py \
#       --workdir=runs/regularization
#   sbatch --array=0-3 --gres=gpu:1 launch/slurm_ablation.sh …    # up to 16 runs at once on each
#
# Every task takes runs from the store in the work directory until none is left. Tasks may start
# at any time and be of any number; one that is killed or preempted loses only the runs it was
# in, which others take over. A task without work waits for the last runs: it may be needed.
# Grace: a cell takes seconds to minutes and is not saved half done, so SIGTERM ends a task at once.
# The work directory must be where file locks work across nodes (NFS 4, Lustre, GPFS).
#SBATCH --job-name=ablation
#SBATCH --array=0-7
#SBATCH --cpus-per-task=1
#SBATCH --mem=4G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --output=slurm-%A_%a.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" # Slurm runs a copy of this file from elsewhere
# shellcheck disable=SC1091
. "${CNN_JAX_VENV:-.venv}/bin/activate"
exec python -m launch.ablate --workers=1 "$@"
