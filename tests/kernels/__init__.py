"""The Metal kernels as csrc/ launches them, and the tools that look at them."""
