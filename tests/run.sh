#!/usr/bin/env bash
# Make the environment if needed and run the tests; arguments go to pytest:  tests/run.sh [-k NAME] [FILE]
set -euo pipefail
cd "$(dirname "$0")/.."
. shared/environment.sh requirements-dev.txt
# A folder of its own: other runs of pytest clean up the shared one.
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
python -m pytest -q --basetemp "$temporary/pytest" "$@"
