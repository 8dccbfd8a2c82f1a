"""A plan becomes files: the one path from options to bytes."""
