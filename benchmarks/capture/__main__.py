"""``python -m benchmarks.capture``."""

import sys

from benchmarks.capture.benchmark import main

sys.exit(main())
