"""Fits on batches of other projects' data loaders, collators and packers, from released packages.

`make test-loaders` runs all of them in an environment of their own. `make test` runs those of transformers, and those
of other packages where these happen to be installed.
"""
