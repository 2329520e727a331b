"""What the recipes train: small models, data modules and corpora that every machine has."""
