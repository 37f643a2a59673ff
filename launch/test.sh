#!/usr/bin/env bash
# Set-up and tests, from a clean clone. Arguments go to pytest: `bash launch/test.sh -k padding`.
# SLOW=1 runs the tests marked slow, too. The last line says what could not be tried; with CI=true
# that is a failure.
. "$(dirname "$0")/setup.sh"
set_up requirements-test.txt

from_debian() { # PACKAGE...: installs them where packages of the system may be installed
  local as_root=(sudo -n)
  [ "$(id -u)" != 0 ] || as_root=()
  if command -v apt-get > /dev/null && "${as_root[@]}" true 2> /dev/null; then
    echo "installing $* with apt-get"
    "${as_root[@]}" apt-get update -qq &&
      "${as_root[@]}" apt-get install -y -qq --no-install-recommends "$@" || true
  fi
}

# The report is tested in a browser: Chromium, else Qt WebEngine.
python -m tests.browser 2> /dev/null || from_debian chromium fonts-dejavu-core
if ! python -m tests.browser 2> /dev/null; then
  echo 'installing PySide6, whose Qt WebEngine is a browser'
  python -m pip install --quiet --disable-pip-version-check PySide6 || true
fi
# The atlas is of Fashion-MNIST.
if [ -n "${SLOW:-}" ] && ! [ -e /usr/share/datasets/fashion-mnist ]; then
  from_debian dataset-fashion-mnist
fi

ruff format --check .
ruff check .
marks=(-m 'not slow and not exhaustive')
[ -z "${SLOW:-}" ] || marks=(-m 'not exhaustive' --durations=25 --durations-min=30)
workers="$(python -c 'import os; print(min(5, 1 + (os.cpu_count() or 1)))')"
exec python -m pytest "${marks[@]}" -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
