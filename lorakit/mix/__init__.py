"""Adapters -> adapter: on their factors alone, without the base."""
