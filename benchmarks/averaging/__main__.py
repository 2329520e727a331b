"""``python -m benchmarks.averaging``."""

import sys

from benchmarks.averaging.benchmark import main

sys.exit(main())
