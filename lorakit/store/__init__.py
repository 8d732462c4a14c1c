"""The store: revisions and kept checkpoints by digest, and one SQLite file with what is known of them."""
