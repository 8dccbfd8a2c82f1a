"""Text in, windows of tokens out: sources, token cache, held-out split, packing, and the order of samples."""
