"""What watching costs the host, at the token rates that people train with."""
