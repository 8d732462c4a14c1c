"""Checkpoints from one place to another: URLs, buckets, the Hub, folders, archives and the store."""
