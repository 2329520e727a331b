"""``python -m benchmarks.detection``."""

import sys

from benchmarks.detection.benchmark import main

sys.exit(main())
