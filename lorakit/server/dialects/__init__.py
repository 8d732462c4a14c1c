"""Other servers' APIs, answered by this one's: what a client was written for goes on to work."""
