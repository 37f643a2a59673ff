#!/usr/bin/env bash
# One training run on Cloud TPU VMs, one or a pod of them, by gcloud:
#
#   bash launch/tpu_vm.sh --name=mine --zone=us-west4-a --type=v5litepod-16 --spot --delete -- \
#       --config=experiments/small.py --workdir=gs://BUCKET/small
#
# makes the TPU VM, unless it is there, copies what is committed in this checkout to every worker,
# installs requirements-tpu.txt, starts launch.train --distributed on all, and shows what worker 0
# prints and, with their number in front, the errors of the others. The run does not depend on this
# command: when the connection breaks, or after Ctrl-C twice, it goes on, and the same command
# comes back to it. What comes after -- are the flags of launch.train.
#
#   --name, --zone  Of the TPU VM. Its project and your account are gcloud's.
#   --type          Such as v5litepod-16, v5p-8, v6e-8.
#   --runtime       Software of the TPU VM; by default the one that Google names for the type.
#   --spot          Cheaper, and may be taken away at any time.
#   --queue         Wait for a free one, by a queued resource of the same name.
#   --restarts      How often the run is started again (20).
#   --delete        Delete the TPU VM when this command ends, whatever the reason.
#   --create_flag   A flag for gcloud's create, such as --create_flag=--internal-ips; repeatable.
#
# Its parts: bash launch/tpu_vm.sh create|run|logs|stop|delete --name=… --zone=… …
#
# Taken away (PREEMPTED, TERMINATED, SUSPENDED): the TPU VM is deleted, made and set up again, and
# the run resumes from its last checkpoint. A TPU VM that this script did not make is never deleted
# without --delete. Asked to stop by the machine (75), a process killed or crashed: started again.
# A mistake (2) or a failure (1) is final. Ctrl-C stops the run, which saves first. Exit codes are
# those of launch.train.
# Several workers need your key in ssh-agent: ssh-add ~/.ssh/google_compute_engine
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }
mistake() {
  echo "error: $1" >&2
  exit 2
}

what=run
case "${1:-}" in
  create | run | logs | stop | delete) what="$1" && shift ;;
  -h | --help | '') usage && exit ;;
esac
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
name='' zone='' type='' runtime='' queue='' delete='' restarts=20
label=tpu_vm_sh # by which it knows again what it made
extra=(--labels=launched_by="$label")
poll="${TPU_VM_POLL:-20}" # seconds
while [ $# -gt 0 ]; do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --runtime=*) runtime="${1#*=}" ;;
    --restarts=*) restarts="${1#*=}" ;;
    --create_flag=*) extra+=("${1#*=}") ;;
    --spot) extra+=(--spot) ;;
    --queue) queue=yes ;;
    --delete) delete=yes ;;
    --) shift && break ;;
    *) mistake "$1 is unknown; --help lists the options, and those of launch.train come after --" ;;
  esac
  shift
done
[ -n "$name" ] || mistake '--name=… is missing: of the TPU VM'
[ -n "$zone" ] || mistake '--zone=… is missing, such as us-west4-a'
case "$restarts" in '' | *[!0-9]*) mistake "--restarts=$restarts is not a number" ;; esac
command -v gcloud > /dev/null ||
  mistake 'gcloud is missing: https://cloud.google.com/sdk/docs/install'
same="--name=$name --zone=$zone${queue:+ --queue}"

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
follower='' watcher='' asked='' state='' owner='' made=0
tpu() { gcloud compute tpus tpu-vm "$@" --zone="$zone" --quiet; }
queued() { gcloud compute tpus queued-resources "$@" --zone="$zone" --quiet; }
everywhere() { # COMMAND
  tpu ssh "$name" --worker=all --ssh-flag='-o ServerAliveInterval=30' --command="$1"
}
say() { echo "$name: $*" >&2; }
pause() { sleep "$poll" & wait $!; }

described() { # COMMAND…: what it prints; NONE if there is nothing of that name; else UNKNOWN
  local said
  if said="$("$@" 2> "$scratch/error")"; then
    echo "$said"
  elif grep -qi 'not.found' "$scratch/error"; then
    echo NONE
  else
    cat "$scratch/error" >&2
    echo UNKNOWN
  fi
}

look() { # sets state, a word of gcloud's or of `described`, and owner
  if [ -n "$queue" ]; then
    read -r state owner <<< "$(described queued describe "$name" \
      --format='value(state.state,tpu.nodeSpec[0].node.labels.launched_by)')"
    [ "$state" = ACTIVE ] || return 0
    state="$(described tpu describe "$name" --format='value(state)')"
    if [ "$state" = NONE ]; then state=PREEMPTED; fi
  else
    read -r state owner <<< "$(described tpu describe "$name" \
      --format='value(state,labels.launched_by)')"
  fi
}

create() {
  [ -n "$type" ] || mistake '--type=… is missing, such as v5litepod-16'
  if [ -z "$runtime" ]; then
    case "$type" in
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      v[234]-*) runtime=tpu-ubuntu2204-base ;;
      *) mistake "--runtime=… is missing: the one for --type=$type is not known here" ;;
    esac
  fi
  say "creating a $type"
  made=$((made + 1))
  if [ -n "$queue" ]; then
    queued create "$name" --node-id="$name" --accelerator-type="$type" \
      --runtime-version="$runtime" "${extra[@]}"
  else
    tpu create "$name" --accelerator-type="$type" --version="$runtime" "${extra[@]}"
  fi
}

remove() {
  say 'deleting it'
  if [ -n "$queue" ]; then queued delete "$name" --force; else tpu delete "$name"; fi
}

prepare() { # until the TPU VM is ready
  local before='' unknown=0
  while true; do
    look
    [ "$state" = "$before" ] || say "$state"
    before="$state"
    if [ "$state" = UNKNOWN ]; then unknown=$((unknown + 1)); else unknown=0; fi
    if [ "$unknown" -gt 5 ]; then say 'failed: gcloud does not tell its state' && exit 1; fi
    case "$state" in
      READY) return ;;
      FAILED) say 'failed: gcloud compute tpus queued-resources describe says why' && exit 1 ;;
      NONE)
        if [ "$made" -gt "$restarts" ]; then say 'made often enough (--restarts)' && exit 75; fi
        if ! create; then
          if [ "$made" = 1 ]; then say 'failed: --queue waits for a free one' && exit 1; fi
          pause
        fi
        ;;
      PREEMPTED | TERMINATED | STOPPED | SUSPENDED)
        if [ "$owner" != "$label" ] && [ -z "$delete" ]; then
          say "is $state and was not made by this script: delete it, or allow that by --delete"
          exit 75
        fi
        remove || pause
        ;;
      *) pause ;;
    esac
  done
}

copy() { # what is committed, to all workers that have no run going on
  # shellcheck disable=SC2016
  local unpack='pid="$(cat cnn_jax_run/pid 2> /dev/null)"
    if ! grep -q tpu_worker "/proc/$pid/cmdline" 2> /dev/null; then
      mkdir -p cnn_jax && find cnn_jax -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} + &&
        tar -xzf cnn_jax.tar.gz
    fi'
  git -C "$root" archive --format=tar.gz --prefix=cnn_jax/ -o "$scratch/cnn_jax.tar.gz" HEAD &&
    tpu scp "$scratch/cnn_jax.tar.gz" "$name:" --worker=all &&
    everywhere "$unpack"
}

unwatch() {
  if [ -n "$watcher" ]; then kill -TERM -- "-$watcher" && wait "$watcher"; fi 2> /dev/null || true
  watcher=''
}

train() { # ID FLAGS…: sets code
  local id="$1" && shift
  set -m # a process group each, to end gcloud with its ssh, and to keep Ctrl-C from them
  everywhere "bash cnn_jax/launch/tpu_worker.sh run $id $(printf '%q ' "$@")" < /dev/null &
  follower=$!
  { # a connection may hang long after the machine has gone
    while sleep "$poll" && kill -0 $$; do
      look
      case "$state" in PREEMPTED | TERMINATED | STOPPED | SUSPENDED | NONE) break ;; esac
    done
    kill -TERM -- "-$follower"
  } > /dev/null 2>&1 &
  watcher=$!
  set +m
  while true; do
    code=0
    wait "$follower" 2> /dev/null || code=$?
    kill -0 "$follower" 2> /dev/null || break # a signal ends wait
  done
  follower=''
  unwatch
}

# shellcheck disable=SC2317,SC2329 # called by trap
interrupted() {
  [ -n "$follower" ] || exit 130
  if [ -n "$asked" ]; then
    kill -TERM -- "-$follower" 2> /dev/null || true
    [ -n "$delete" ] || say "goes on without this command: bash launch/tpu_vm.sh logs|stop $same"
    exit 130
  fi
  asked=yes
  say 'stopping; the run saves first (Ctrl-C again: leave it alone)'
  everywhere 'bash cnn_jax/launch/tpu_worker.sh stop' > "$scratch/stop" 2>&1 < /dev/null &
}

# shellcheck disable=SC2317,SC2329 # called by trap
finish() {
  local code=$?
  trap '' INT TERM
  unwatch
  if [ -n "$delete" ]; then
    look
    if [ "$state" != NONE ] && ! remove; then
      say "could NOT be deleted and is charged: bash launch/tpu_vm.sh delete $same"
    fi
  elif [ "$state" = READY ]; then
    say "is still there and charged: bash launch/tpu_vm.sh delete $same"
  fi
  rm -rf "$scratch"
  exit "$code"
}

case "$what" in
  create) prepare && exit ;;
  logs | stop)
    if [ "$what" = logs ]; then what=follow; fi
    everywhere "bash cnn_jax/launch/tpu_worker.sh $what" && exit
    code=$?
    if [ "$code" = 176 ]; then code=175; fi
    exit $((code > 100 && code < 255 ? code - 100 : code))
    ;;
  delete) remove && exit ;;
esac

for argument in "$@"; do
  case "$argument" in
    --config=*)
      git -C "$root" cat-file -e "HEAD:${argument#*=}" 2> /dev/null ||
        mistake "$argument is not committed in $root, and only what is committed is copied"
      ;;
    --workdir=gs://*) ;;
    --workdir=*) say "note: $argument is lost with the TPU VM; gs://BUCKET/RUN is not" ;;
  esac
done
if [ -n "$(git -C "$root" status --porcelain --untracked-files=no)" ]; then
  say 'note: changes in the checkout that are not committed are not copied'
fi
trap interrupted INT TERM
trap finish EXIT

started="$(date +%s)-$$" attempt=0 count=0
while true; do
  prepare
  code=255
  if copy; then train "$started-$attempt" "$@"; else say 'cannot be reached'; fi
  case "$code" in
    0) break ;;
    102) code=2 && break ;;
    176) code=75 && break ;;
  esac
  look
  if [ "$state" = READY ] && [ "$code" != 175 ] && [ "$code" != 255 ]; then
    pause # a machine that is taken away may not say so yet
    look
  fi
  attempt=$((attempt + 1))
  if [ "$state" != READY ]; then
    why="is $state"
  elif [ "$code" = 175 ]; then
    why='stopped the run, which saved'
  elif [ "$code" = 255 ] || [ "$code" -le 100 ]; then
    why="lost the connection (gcloud ended with $code)"
    attempt=$((attempt - 1)) # it may still go on
  elif ! everywhere 'bash cnn_jax/launch/tpu_worker.sh survived' 2> /dev/null; then
    why='a process was killed or crashed' # and with it the others, which failed
  else
    code=$((code - 100))
    break
  fi
  count=$((count + 1))
  if [ "$count" -gt "$restarts" ]; then
    say "$why; started again often enough (--restarts=$restarts); the same command goes on"
    code=75
    break
  fi
  say "$why; again ($count of $restarts)"
  pause
done
exit "$code"
