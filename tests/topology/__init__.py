"""Tests of whole streams: producer and consumer processes between two databases."""
