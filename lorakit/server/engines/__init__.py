"""What serves models behind the gateway: the seam, vLLM from inside, and over HTTP."""
