"""The callbacks, one file each. They decide when to compute; the mathematics is in the other packages."""
