"""The process that owns the address, and the engine's that it starts, watches and ends."""
