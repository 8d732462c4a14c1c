"""Real trainers as test data: programs that train a tiny model for a few steps, and what they wrote."""
