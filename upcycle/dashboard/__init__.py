"""What a sweep is looked at with: a W&B workspace and a self-contained report, from one declaration of their panels."""
