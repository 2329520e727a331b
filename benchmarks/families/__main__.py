"""``python -m benchmarks.families``."""

import sys

from benchmarks.families.benchmark import main

sys.exit(main())
