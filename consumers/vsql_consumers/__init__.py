"""The target side: collects, verifies, opens, applies, acknowledges. Imports neither producer nor syncctl."""
