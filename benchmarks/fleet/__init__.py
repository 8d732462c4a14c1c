"""Many engines, simulated with the timings of a real one: `python benchmarks/fleet.py`."""
