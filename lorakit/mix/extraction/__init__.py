"""A full fine-tune minus its base -> an adapter."""
