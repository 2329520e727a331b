"""Audits of models that were trained without us: `memsink audit`."""
