"""What can be got out of a model: extraction, membership, canaries, the audit of a finished model."""
