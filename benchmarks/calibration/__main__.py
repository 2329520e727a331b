"""``python -m benchmarks.calibration``."""

import sys

from benchmarks.calibration.benchmark import main

sys.exit(main())
