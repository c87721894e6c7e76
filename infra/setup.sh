#!/usr/bin/env bash
# Builds .venv from infra/locks/cpu.txt, with Bidbeam in it as an editable installation: `make setup`.
set -euo pipefail
cd "$(dirname "$0")/.."
source infra/indexes.sh

lock=infra/locks/cpu.txt
venv=.venv
python="$venv/bin/python"

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
  local candidate
  # 3.11 first: the lock is made for it.
  for candidate in ${PYTHON:-} python3.11 python3 python3.12 python3.13 python; do
    if new_enough "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  echo "error: Bidbeam needs Python 3.11 or newer, and none was found; install one, or say where it is: make setup PYTHON=/path/to/python3.11" >&2
  return 1
}

install_lock() {
  local torch
  # PyPI's torch for Linux is the CUDA build; the engine for the CPU wants the CPU build of the same version.
  torch="$(sed -n 's/^\(torch==[0-9.]*\)$/\1+cpu/p' "$lock")"
  if "$python" -m pip install --quiet --disable-pip-version-check "$(grep '^uv==' "$lock")"; then
    share_indexes_with_uv "$python"
    local install=("$python" -m uv pip install --python "$python" --no-deps --quiet --requirement "$lock")
    # Where Python keeps no bytecode, each start of each process would compile what it imports: vLLM loads in half the
    # time with it.
    if [ -n "${PYTHONDONTWRITEBYTECODE:-}" ]; then install+=(--compile-bytecode); fi
    "${install[@]}" "$torch" && return
    echo "setup: the CPU build of torch is not on the configured index; asking PyTorch's own" >&2
    "${install[@]}" --torch-backend cpu && return
  fi
  echo "setup: uv could not install the lock; pip tries, which takes some minutes" >&2
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --requirement "$lock" "$torch"
}

if ! new_enough "$python"; then
  rm -rf "$venv"
  base="$(find_python)"
  echo "setup: $("$base" --version) at $base" >&2
  "$base" -m venv "$venv" || {
    echo "error: $base cannot make virtual environments; install its venv module (Debian and Ubuntu: apt-get install python3-venv)" >&2
    exit 1
  }
fi
echo "setup: installing $(grep -c '==' "$lock") packages from $lock" >&2
install_lock
"$python" -m uv pip install --python "$python" --no-deps --no-build-isolation --quiet --editable . 2>/dev/null ||
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
touch "$venv/installed"
echo "setup: done in ${SECONDS} s" >&2
