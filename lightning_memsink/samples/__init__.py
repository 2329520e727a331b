"""Samples: ids and tokens of a batch, and the tables of every sample's losses."""
