"""The scenarios of PostgreSQL's own subscription tests, through Kafka; each file names its scenario."""
