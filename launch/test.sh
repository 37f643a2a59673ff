#!/usr/bin/env bash
# Set-up and tests, from a clean clone. Arguments go to pytest: `bash launch/test.sh -k padding`.
# SLOW=1 runs the tests marked slow, too.
. "$(dirname "$0")/setup.sh"
set_up requirements-test.txt
ruff format --check .
ruff check .
marks='not slow and not exhaustive'
[ -z "${SLOW:-}" ] || marks='not exhaustive'
workers="$(python -c 'import os; print(min(5, 1 + (os.cpu_count() or 1)))')"
exec python -m pytest -m "$marks" -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
