"""What memsink says to other people's tools."""
