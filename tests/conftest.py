"""Settings of all tests."""

import os

# The models here are small: more threads do not make them faster, and threads that wait for each other on a busy
# machine make them many times slower. Processes that the tests start inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")
