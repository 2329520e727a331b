"""Who is in a batch: ids, tokens, and the tables that remember every sample."""
