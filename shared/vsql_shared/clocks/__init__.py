"""How far the clocks of nodes are apart: measured over Kafka, and what a host says of its own clock."""
