#!/usr/bin/env bash
# Lint and tests, in an environment of their own: bash launch/test.sh [pytest's arguments]
#   bash launch/test.sh                      everything
#   bash launch/test.sh tests/test_cli.py    one file
#   bash launch/test.sh -n 8                 more processes than 2
# Compiled programs are kept between runs in ~/.cache/t5x_lite/tests (T5X_LITE_TEST_CACHE).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh

make_environment .venv-test test
export PATH="$PWD/.venv-test/bin:$PATH"
ruff check .
ruff format --check .
SECONDS=0
python -m pytest -n 2 --dist worksteal --durations=15 "$@" < /dev/null
echo "tests: $SECONDS s"
