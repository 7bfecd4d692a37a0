"""The operators: numbers, derivatives, transformations, devices and errors."""
