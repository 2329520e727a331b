"""What the package claims, measured: ``python -m benchmarks.NAME [--seeds N] [--quick] [--json FILE]``."""
