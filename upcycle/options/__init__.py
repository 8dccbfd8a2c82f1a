"""What a user can say: options of the commands, and how the shell and Hydra bring them."""
