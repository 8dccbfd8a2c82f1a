"""Pure functions on tensors that make experts and routers; knows only torch."""
