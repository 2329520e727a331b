"""``python -m benchmarks.averaging``"""
