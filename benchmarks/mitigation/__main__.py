"""``python -m benchmarks.mitigation``."""

import sys

from benchmarks.mitigation.benchmark import main

sys.exit(main())
