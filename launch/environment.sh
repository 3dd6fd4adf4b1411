# shellcheck shell=bash
# Sourced by the scripts beside it, from the repository's root:
#   make_environment FOLDER EXTRAS [REQUIREMENTS]
# Makes a virtual environment with the pinned set, unless it is there and nothing has changed. The
# lines of the file REQUIREMENTS, arguments of pip install, come first, one after the other.

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
    # Asked, not only found: pyenv leaves commands on the path that don't run.
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or newer among ${PYTHON:-python3.11, python3.12, python3.13, python3, python};" \
    "install one, or name it: PYTHON=/path/to/python3.11 bash $0" >&2
  return 1
}

make_environment() {
  local folder=$1 extras=$2 requirements=${3:-/dev/null} python wanted requirement
  wanted="$extras $(cat setup.cfg pyproject.toml launch/constraints.txt "$requirements" | cksum)"
  if [ "$(cat "$folder/.installed" 2>/dev/null)" = "$wanted" ]; then
    echo "environment: $folder is up to date"
    return
  fi
  local start=$SECONDS
  if [ ! -x "$folder/bin/pip" ]; then
    python=$(find_python)
    echo "environment: making $folder with $python"
    if ! "$python" -m venv --clear "$folder"; then
      echo "error: '$python -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2
      return 1
    fi
  fi
  echo "environment: installing .[$extras] into $folder; a few minutes the first time"
  local install=("$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-input)
  install+=(-c launch/constraints.txt)
  while read -ra requirement; do
    "${install[@]}" "${requirement[@]}"
  done < <(grep -v '^#' "$requirements")
  "${install[@]}" -e ".[$extras]"
  echo "$wanted" > "$folder/.installed"
  echo "environment: installed in $((SECONDS - start)) s"
}
