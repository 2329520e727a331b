"""Per-sample losses, read out of the user's own loss call, and weights on them."""
