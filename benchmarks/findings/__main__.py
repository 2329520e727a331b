"""``python -m benchmarks.findings``."""

import sys

from benchmarks.findings.benchmark import main

sys.exit(main())
