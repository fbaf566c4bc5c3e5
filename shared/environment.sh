# Make the virtual environment .venv of the repository, if it is not there or a requirements file has changed, put it on
# the PATH, and set what makes programs faster. Source from the repository's root:
#   . shared/environment.sh [requirements file]
#
# PYTHON names the interpreter (default: python3; 3.10 or newer).

environment_requirements=${1:-requirements.txt}
environment_stamp=.venv/.installed-$(basename "$environment_requirements")

if [ ! -x .venv/bin/python ]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "Python 3.10 or newer is needed; name one in the variable PYTHON" >&2
    exit 1
  }
  echo "making the virtual environment .venv" >&2
  "${PYTHON:-python3}" -m venv .venv
fi
if [ "$(cat "$environment_stamp" 2>/dev/null)" != "$(cat requirements*.txt)" ]; then
  echo "installing $environment_requirements" >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$environment_requirements"
  cat requirements*.txt >"$environment_stamp"
fi
PATH=$PWD/.venv/bin:$PATH
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PATH PYTHONPATH
# On CPUs: large blocks in huge pages, a tenth faster; and threads that wait leave their core to the data loader after
# some microseconds, not milliseconds.
export THP_MEM_ALLOC_ENABLE=1 GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"
