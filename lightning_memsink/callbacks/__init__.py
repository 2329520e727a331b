"""When the mathematics is asked: one thin file a callback."""
