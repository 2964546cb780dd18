"""Access to Kafka: client settings, topics, producers and consumers."""
