"""What a model on disk is: its config, its tensors, what kind of MoE; and loading it."""
