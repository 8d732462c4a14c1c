"""What a trainer wrote: which kind, is it finished, what it says of itself."""
