"""``python -m benchmarks.faults``"""
