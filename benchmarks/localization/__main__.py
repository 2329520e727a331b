"""``python -m benchmarks.localization``."""

import sys

from benchmarks.localization.benchmark import main

sys.exit(main())
