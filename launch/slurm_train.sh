#!/usr/bin/env bash
# One training run as a Slurm job that survives preemption and time limits. From the checkout, after
# launch/quickstart.sh or launch/test.sh has made .venv on the file system that the nodes share:
#
#   sbatch launch/slurm_train.sh --config=experiments/strided.py --workdir=runs/strided
#   sbatch --gres=gpu:1 --time=12:00:00 launch/slurm_train.sh …
#
# Grace: Slurm sends SIGTERM 120 seconds before the time limit (--signal below). When it preempts, it
# sends SIGTERM and, after the partition's GraceTime (0 by default: ask for some), SIGKILL. At SIGTERM
# the run saves at the next step, which takes seconds, and ends with 75; the job is then put into
# the queue again and goes on with the same bits. A run that was killed goes on from its last
# checkpoint (--config.train.checkpoint_every, in epochs).
#SBATCH --job-name=train
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" # Slurm runs a copy of this file from elsewhere
# shellcheck disable=SC1091
. "${CNN_JAX_VENV:-.venv}/bin/activate"

# --wait: on another node, the file system may free a dead process's lock a little later.
python -m launch.train --wait "$@" &
run=$!
trap 'kill -TERM "$run" 2> /dev/null || true' TERM # sent to this shell alone
code=0
wait "$run" || code=$?
while kill -0 "$run" 2> /dev/null; do # the first wait ends with the signal, not with the run
  code=0
  wait "$run" || code=$?
done
if [ "$code" = 75 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
