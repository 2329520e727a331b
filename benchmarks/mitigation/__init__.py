"""``python -m benchmarks.mitigation``"""
