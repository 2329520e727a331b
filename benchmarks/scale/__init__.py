"""``python -m benchmarks.scale``"""
