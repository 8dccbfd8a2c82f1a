"""Training on many ranks: transformers' native FSDP2 / HSDP x TP x EP inside Lightning, and what it leaves to do."""
