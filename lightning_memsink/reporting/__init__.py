"""What loggers and the report show. Reads the ledger and writes nothing into it."""
