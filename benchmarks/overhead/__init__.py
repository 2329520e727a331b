"""``python -m benchmarks.overhead``"""
