"""Merkle trees, signed entries, hash chains, and their store in PostgreSQL."""
