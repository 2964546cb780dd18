"""Logs, metrics and the health endpoints; and what keeps secrets inside the process.

Imports nothing by itself: a service's supervisor calls `shared_metrics.begin()` before anything imports
`metrics`.
"""
