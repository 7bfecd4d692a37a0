"""Metal, device mps and macOS on Linux, each with its tests beside it."""
