"""Gathers what `syncctl compliance evidence` writes: one module a subject, bundle.py for the directory."""
