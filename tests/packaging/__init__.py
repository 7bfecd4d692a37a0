"""What is installed and what it promises: commands, extension, interface, documents, names of torch."""
