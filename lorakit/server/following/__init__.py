"""What should be served, compared with what is: arrivals, turns, the guard, and the reconciler."""
