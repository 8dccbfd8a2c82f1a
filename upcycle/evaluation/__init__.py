"""What a model is worth: losses on held-out text, and tasks of the lm-evaluation-harness."""
