"""``python -m benchmarks.calibration``"""
