"""One thread per test process: pytest runs as many processes as there are cores, and the networks here are tiny."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
