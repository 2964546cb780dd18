"""The source side: decodes WAL, batches, seals, publishes. Never imports the consumer or syncctl."""
