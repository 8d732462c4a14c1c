"""Mixes at request time: read, made, kept, and named."""
