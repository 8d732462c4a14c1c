"""Anything into what vLLM loads."""
