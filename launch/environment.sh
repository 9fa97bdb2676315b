# shellcheck shell=bash
# Sourced by the scripts beside it, in the folder of train.py: puts the virtual environment's programs on PATH.
# VENV  virtual environment (.venv); empty: the python on PATH

fail() {
  echo "error: $1" >&2
  exit 2
}

venv=${VENV-.venv}
if [[ -n $venv ]]; then
  [[ -x $venv/bin/torchrun ]] || fail "VENV: $venv is not a virtual environment with torchrun in it (empty: use PATH)"
  venv=$(cd "$venv" && pwd)
  export PATH=$venv/bin:$PATH
fi
