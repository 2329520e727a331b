"""Models, data modules and corpora that the recipes train, all available without a download."""
