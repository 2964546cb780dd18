"""The daemon: one supervisor process that starts both services of a node and keeps them running.

`supervisor.py` is the loop, `state.py` what it leaves on disk, `identity.py` which process is meant,
`logfile.py` where the services' output goes. Imports neither service.
"""
