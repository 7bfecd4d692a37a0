"""The wheel for a Mac, built and proven on Linux. See README.md."""
