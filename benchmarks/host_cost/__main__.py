"""``python -m benchmarks.host_cost``."""

import sys

from benchmarks.host_cost.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
