"""Stage 1: the supervised cold start."""
