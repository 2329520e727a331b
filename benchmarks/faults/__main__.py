"""``python -m benchmarks.faults``."""

import sys

from benchmarks.faults.benchmark import main

sys.exit(main())
