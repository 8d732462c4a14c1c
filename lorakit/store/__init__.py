"""The store: revisions by digest, and one SQLite file with what is known of them."""
