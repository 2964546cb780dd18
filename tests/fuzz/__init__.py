"""Parsers under mutated input: what is tried (parsers.py), and how long, guided by coverage (__main__.py)."""
