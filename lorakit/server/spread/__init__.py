"""Several engines behind one gateway: which of them has what, and which of them answers."""
