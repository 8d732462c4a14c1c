"""What is to be seen of it: events, logs, metrics, traces."""
