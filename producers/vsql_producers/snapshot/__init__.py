"""First copy: the rows a table already holds, sealed and signed as a chain of its own for one target."""
