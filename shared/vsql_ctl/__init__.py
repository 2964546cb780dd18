"""syncctl: the operator's command line. Acts through the node's own database; holds no replication logic."""
