"""``python -m benchmarks.overfitting``."""

import sys

from benchmarks.overfitting.benchmark import main

sys.exit(main())
