"""One model on many ranks: layouts of transformers' native FSDP2 x TP x EP, and planning them beyond one machine."""
