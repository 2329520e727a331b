"""Fits of other projects' modules, from released packages, with our callbacks on. `make test-ecosystem` runs them.

Not collected by pytest: a run makes virtual environments (.venv-ecosystem/) and takes many minutes.
"""
