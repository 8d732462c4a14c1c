"""The ways to make one delta of several: pure functions on low-rank factors, one module at a time."""
