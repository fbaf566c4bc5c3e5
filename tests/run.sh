#!/usr/bin/env bash
# Make the environment if needed and run the tests; arguments go to pytest:  tests/run.sh [-k NAME] [FILE]
set -euo pipefail
cd "$(dirname "$0")/.."
. shared/environment.sh requirements-dev.txt
exec python -m pytest -q "$@"
