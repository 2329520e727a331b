"""``python -m benchmarks.sources``."""

import sys

from benchmarks.sources.benchmark import main

sys.exit(main())
