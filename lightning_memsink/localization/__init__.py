"""Which units carry memorized samples: methods that score units, and tests of such methods."""
