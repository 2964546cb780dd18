"""Faults: whatever is killed, stopped, cut off or filled up, nothing is lost, doubled, torn or out of order.

The parts, in the order of a run: `workload` commits transactions it knows, `checker` says what must hold of
them (while the run goes on, and at its end), `faults` are what is done to the servers and services of a
`scene`, `summary` keeps what became of each run. `make test-faults` is `python -m tests.chaos`.
"""
