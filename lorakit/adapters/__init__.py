"""An adapter: its config, its keys, its factors; reading, writing, checking; the algebra on deltas."""
