"""Names that mean several revisions: who meets which, what answers only to be compared, and how they compare."""
