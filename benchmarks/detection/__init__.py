"""``python -m benchmarks.detection``"""
