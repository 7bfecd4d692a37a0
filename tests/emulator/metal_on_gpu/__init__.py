"""Metal on an NVIDIA GPU: unmodified Metal source, compiled here and launched there. See README.md."""
