#!/usr/bin/env bash
# What launch/tpu_vm.sh calls on every worker of a TPU VM:
#
#   bash cnn_jax/launch/tpu_worker.sh run ID FLAGS… | follow | stop | survived
#
# The run is nobody's child here, so it outlives the ssh connection: gcloud repeats a command by
# itself when a connection breaks, and then only the log is followed again. ~/cnn_jax_run holds its
# id, flags, pid, train (the pid of launch.train), log, code, and stopped when it was asked to.
# Exit codes are the run's + 100 (those below and 255 are gcloud's and ssh's own); 176: was stopped.
set -euo pipefail
place=~/cnn_jax_run

alive() { # not a dead process's pid in other hands, and no zombie, whose command line is empty
  [ -e "$place/pid" ] && grep -q tpu_worker "/proc/$(cat "$place/pid")/cmdline" 2> /dev/null
}

run() { # ID FLAGS…: start the run, or come back to it
  local id="$1" wanted lines=20
  shift
  wanted="$(printf '%q ' "$@")"
  if alive; then
    if [ "$(cat flags)" != "$wanted" ]; then
      echo "error: another run goes on here; stop it first: $(cat flags)" >&2
      exit 102
    fi
  elif [ "$(cat id 2> /dev/null)" != "$id" ]; then
    rm -f id flags pid train log code stopped
    echo "$wanted" > flags
    echo "$id" > id
    : > log
    setsid bash ~/cnn_jax/launch/tpu_worker.sh hold "$@" < /dev/null >> log 2>&1 &
    until [ -e pid ] || ! kill -0 $!; do sleep 0.1; done
    lines=+1
  fi
  follow "$lines"
}

hold() { # FLAGS…: install and train, whether anybody looks on or not
  local code=0
  echo $$ > "$place/pid" # its parent would name it before it has its command line
  trap : TERM # when the machine shuts down all get it; launch.train saves
  install "$@" || code=$?
  if [ -e "$place/stopped" ]; then # asked to while installing
    code=75
  elif [ "$code" = 0 ]; then
    cd ~/cnn_jax
    "${CNN_JAX_VENV:-.venv}/bin/python" -m launch.train --distributed "$@" &
    echo $! > "$place/train"
    wait $! || code=$?
    while kill -0 $! 2> /dev/null; do # a signal ends the first wait
      code=0
      wait $! || code=$?
    done
  fi
  echo "$code" > "$place/code"
}

install() { # FLAGS…
  local files=(requirements-tpu.txt)
  case " $*" in *=gs://*) files+=(requirements-gcs.txt) ;; esac
  # Images of Ubuntu 22.04 have Python 3.10, others no ensurepip.
  if ! python3 -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
    export PATH="$HOME/.local/bin:$PATH"
    command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh || return 1
    uv python install --quiet 3.12 || return 1
    PYTHON="$(uv python find 3.12)" && export PYTHON || return 1
  fi
  # A shell of its own: set -e does not hold in a function that is called with ||.
  # shellcheck disable=SC2016
  bash -c '. ~/cnn_jax/launch/setup.sh; set_up "$@"' set_up "${files[@]}"
}

follow() { # LINES: show the log until the run has ended; end with its code
  local code=137 number metadata=http://metadata.google.internal/computeMetadata/v1/instance
  [ -e id ] || { echo 'error: no run was started here' >&2 && exit 102; }
  number="${TPU_WORKER_ID:-$(curl -sf -m 5 -H 'Metadata-Flavor: Google' \
    "$metadata/attributes/agent-worker-number" || true)}"
  (while alive; do sleep 0.3; done) &
  if [ "${number:-0}" = 0 ]; then
    tail -n "$1" -s 0.3 -f --pid=$! log
  else
    tail -n "$1" -s 0.3 -f --pid=$! log | sed -u "s/^/worker $number: /" >&2
  fi
  if [ -e code ]; then code="$(cat code)"; fi
  case "$code" in 75 | 143) if [ -e stopped ]; then code=76; fi ;; esac # 143: was just starting
  [ "$code" = 0 ] || exit $((code < 154 ? code + 100 : 254))
}

stop() {
  touch stopped
  if [ -e train ]; then kill -TERM "$(cat train)" 2> /dev/null || true; fi
}

survived() { # whether the run came to its end by itself: it was not killed, nor did it crash
  [ -e code ] && [ "$(cat code)" -lt 129 ]
}

mkdir -p "$place"
cd "$place"
case "$1" in
  run | hold) "$@" ;;
  follow) follow 20 ;;
  stop | survived) "$1" ;;
esac
