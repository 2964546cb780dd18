"""Data keys, sealing and signing. Pure: no I/O beyond reading key files."""
