#!/usr/bin/env bash
# One training run as a Slurm job that survives preemption and time limits. From the checkout, after
# launch/quickstart.sh or launch/test.sh has made .venv on the file system that the nodes share:
#
#   sbatch launch/slurm_train.sh --config=experiments/small.py --workdir=runs/small
#   sbatch --gres=gpu:1 --time=12:00:00 launch/slurm_train.sh …
#   sbatch --nodes=4 --ntasks-per-node=8 --gres=gpu:8 --mem=0 launch/slurm_train.sh …
#
# With several tasks (the last line) the run has one process for each, which takes the GPU of its
# number on its node: as many tasks as GPUs, and no --gpus-per-task, which would hide the others.
#
# Grace: Slurm sends SIGTERM 120 seconds before the time limit (--signal below). When it preempts, it
# sends SIGTERM and, after the partition's GraceTime (0 by default: ask for some), SIGKILL. At SIGTERM
# the run saves at the next step, which takes seconds, and ends with 75; the job is then put into
# the queue again and resumes with the same bits. A run that was killed resumes from its last
# checkpoint (--config.train.checkpoint_every, in epochs): after the loss of a node Slurm queues the
# job again by itself; after SIGKILL or a crash of one of several processes, this script does, as
# long as the job was queued again fewer than $RESTARTS times (5). Other failures are final.
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
train=(python -m launch.train --wait)
# shellcheck disable=SC2317,SC2329 # stop is called by trap
if [ "${SLURM_NTASKS:-1}" -gt 1 ]; then
  # When one process ends, the others end by themselves within JAX's 100 seconds and with the same
  # exit code; srun would kill them before they have saved, and hide the code, where
  # KillOnBadExit is set. Since Slurm 22.05 srun does not take --cpus-per-task from the job.
  step=(srun --kill-on-bad-exit=0 --wait=180 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")
  train=("${step[@]}" "${train[@]}" --distributed)
  # srun answers SIGTERM by killing its tasks; scancel passes it on to them, and not to this shell.
  stop() { scancel --signal=TERM "$SLURM_JOB_ID"; }
else
  stop() { kill -TERM "$run"; }
fi

"${train[@]}" "$@" &
run=$!
trap 'stop 2> /dev/null || true' TERM # sent to this shell alone
code=0
wait "$run" || code=$?
while kill -0 "$run" 2> /dev/null; do # the first wait ends with the signal, not with the run
  code=0
  wait "$run" || code=$?
done
case $code in
  75) again=yes ;;
  134 | 135 | 137 | 139) # SIGABRT, SIGBUS, SIGKILL, SIGSEGV
    again=no
    if [ "${SLURM_NTASKS:-1}" -gt 1 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${RESTARTS:-5}" ]; then
      again=yes
    fi
    ;;
  *) again=no ;;
esac
if [ "$again" = yes ] && [ -n "${SLURM_JOB_ID:-}" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
