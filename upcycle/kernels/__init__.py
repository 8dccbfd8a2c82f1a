"""Expert kernels behind one signature, transformers' own: `fn(experts, x [S, H], index [S, K], weights [S, K])`."""
