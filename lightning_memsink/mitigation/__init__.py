"""Holding memorization back: one idea a file, pure functions on tensors and modules."""
