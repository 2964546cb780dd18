"""What both services are as processes: one supervisor, one worker process per stream."""
