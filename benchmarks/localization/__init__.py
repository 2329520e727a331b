"""``python -m benchmarks.localization``"""
