"""``python -m benchmarks.device``."""

import sys

from benchmarks.device.benchmark import main

sys.exit(main())
