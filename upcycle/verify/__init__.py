"""Is it the same model? The equivalence report, and what a checkpoint holds."""
