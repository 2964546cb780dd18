"""The target side: collects, verifies, opens, applies, acknowledges. Never imports the producer or syncctl."""
