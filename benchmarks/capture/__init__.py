"""``python -m benchmarks.capture``"""
