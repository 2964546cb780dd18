"""What source, target and operator share: formats, keys, audit, Kafka and PostgreSQL access, settings."""
