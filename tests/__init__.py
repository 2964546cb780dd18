"""Tests: `unit` (bytes and values), `services` (one server), `topology` (whole streams), `chaos` (faults).

`tests.stack` starts the real PostgreSQL and Kafka servers all but the unit tests run against.
"""
