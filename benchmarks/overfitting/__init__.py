"""``python -m benchmarks.overfitting``"""
