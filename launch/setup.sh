# shellcheck shell=bash
# Sourced by the scripts: makes .venv in the checkout and installs a requirements file into it.
# PYTHON chooses the interpreter (default python3); CNN_JAX_VENV another folder than .venv.
# An unchanged requirements file is not installed again.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

set_up() { # REQUIREMENTS...
  local venv="${CNN_JAX_VENV:-.venv}" python="${PYTHON:-python3}" wanted stamp
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $("$python" --version 2>&1) is too old; set PYTHON to a Python 3.11 or newer" >&2
    exit 2
  fi
  [ -e "$venv/bin/activate" ] || "$python" -m venv "$venv"
  # shellcheck disable=SC1091
  . "$venv/bin/activate"
  wanted="$(cat "$@" requirements*.txt | cksum)"
  stamp="$venv/installed-$(basename "$1")"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    local files=()
    for file in "$@"; do files+=(-r "$file"); done
    echo "installing $* into $venv (a few minutes the first time)"
    python -m pip install --quiet --disable-pip-version-check "${files[@]}"
    echo "$wanted" > "$stamp"
  fi
}
