"""Is a sample memorized? Matched controls, conformal p-values, false-discovery control, onset."""
