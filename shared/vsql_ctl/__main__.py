"""`python -m vsql_ctl`: the same as the `syncctl` script."""

from vsql_ctl.cli import main

main()
