"""Audits of finished models: `memsink audit`."""
