"""``python -m benchmarks.overhead``."""

import sys

from benchmarks.overhead.benchmark import main

sys.exit(main())
