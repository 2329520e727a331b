"""``python -m benchmarks.families``"""
