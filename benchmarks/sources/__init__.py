"""``python -m benchmarks.sources``"""
