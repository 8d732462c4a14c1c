"""LoRAX's own API, for its clients: each request becomes one of OpenAI's, and takes that one's way."""
