"""Bytes on disk: safetensors headers and ranges, whole-or-nothing folders, copies, digests."""
