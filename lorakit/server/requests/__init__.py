"""A request's way: read, counted in, handed on, named, counted out."""
