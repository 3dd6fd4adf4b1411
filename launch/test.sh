#!/usr/bin/env bash
# Lint and tests, in an environment of their own: bash launch/test.sh [pytest's arguments]
#   bash launch/test.sh                      everything
#   bash launch/test.sh tests/test_cli.py    one file
#   bash launch/test.sh -n 8                 more processes than 2
#   bash launch/test.sh --parity             every family beside transformers and torch, for minutes;
#                                            -m quick: a slice of it
#   bash launch/test.sh --make_golden        write the small files of families that have none yet
# Compiled programs are kept between runs in ~/.cache/t5x_lite/tests (T5X_LITE_TEST_CACHE).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh

if [ "${1:-}" = --parity ] || [ "${1:-}" = --make_golden ]; then
  make_environment .venv-parity test,hub tests/parity/requirements.txt
  export PATH="$PWD/.venv-parity/bin:$PATH"
  if [ "$1" = --make_golden ]; then
    exec python tests/parity/make_golden.py "${@:2}"
  fi
  exec python -m pytest -n 2 --dist worksteal --durations=10 -o python_files='parity_*.py' \
    -o addopts="--import-mode=importlib --strict-markers" tests/parity "${@:2}" < /dev/null
fi

make_environment .venv-test test,hub,curate,datasets,tune,tpu tests/hub/requirements.txt
export PATH="$PWD/.venv-test/bin:$PATH"
ruff check .
ruff format --check .
shellcheck -x launch/*.sh launch/*.sbatch .ci/run
SECONDS=0
python -m pytest -n 2 --dist worksteal --durations=15 "$@" < /dev/null
echo "tests: $SECONDS s"
