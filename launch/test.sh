#!/usr/bin/env bash
# Set-up and tests, from a clean clone. Arguments go to pytest: `bash launch/test.sh -k padding`.
# SLOW=1 runs the tests marked slow, too.
. "$(dirname "$0")/setup.sh"
set_up requirements-test.txt
ruff format --check .
ruff check .
exec python -m pytest ${SLOW:+-m "slow or not slow"} "$@"
