#!/usr/bin/env bash
# Makes infra/locks/cpu.txt anew from pyproject.toml: `make lock`. Needs the package index.
set -euo pipefail
cd "$(dirname "$0")/../.."
source infra/indexes.sh

python="${PYTHON:-.venv/bin/python}"
share_indexes_with_uv "$python"
# Python 3.11, the oldest that is supported: what resolves there, installs on newer ones.
"$python" -m uv pip compile pyproject.toml \
  --extra cpu --extra s3 --extra aws --extra google --group dev --group demo \
  --override infra/locks/overrides.txt --python-version 3.11 --upgrade \
  --no-header --no-annotate --quiet --output-file infra/locks/cpu.txt
{
  echo "# The environment of make setup: CPU engine, S3, development tools and the demo. Made by make lock; not for editing."
  # The build of torch is chosen at installation (infra/setup.sh); the version is what is locked.
  sed 's/^\(torch==[0-9.]*\)+.*/\1/' infra/locks/cpu.txt
} > infra/locks/cpu.txt.new
mv infra/locks/cpu.txt.new infra/locks/cpu.txt
