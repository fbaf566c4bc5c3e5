#!/usr/bin/env bash
# Checks the lattice methods against our searches, with k2 1.23.4 from PyPI. That needs Python 3.10, PyTorch 1.13.1 and
# its CUDA libraries (5 GB of disk, no GPU), so it has an environment of its own and is no part of the tests.
#
#   tests/optional/k2_one_best.sh [FOLDER]      # of the environment, kept for the next time; default: .venv-k2
#
# PYTHON310 is Python 3.10, PYTHON the one with which the project runs.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-.venv-k2}
python310=${PYTHON310:-python3.10}
if ! "$folder/bin/python" -c "import k2" 2>/dev/null; then
  "$python310" -m venv "$folder"
  "$folder/bin/pip" install torch==1.13.1 k2==1.23.4 "numpy<2"
fi
files=$(mktemp -d)
trap 'rm -r "$files"' EXIT
"${PYTHON:-python}" tests/optional/k2_one_best.py ours "$files"
"$folder/bin/python" tests/optional/k2_one_best.py k2 "$files"
