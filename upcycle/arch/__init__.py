"""Names and shapes, never values: which tensors a dense family has, and what a MoE type can express."""
