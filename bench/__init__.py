"""Benchmarks: the same work through vsql-sync and its peers in one run; ratios are the result."""
