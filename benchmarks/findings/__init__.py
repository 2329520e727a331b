"""``python -m benchmarks.findings``"""
