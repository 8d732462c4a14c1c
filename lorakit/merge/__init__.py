"""Base + adapters -> base: resolve names, plan, execute."""
