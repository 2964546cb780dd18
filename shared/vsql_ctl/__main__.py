"""`python -m vsql_ctl` is `syncctl`."""

from vsql_ctl.cli import main

main()
