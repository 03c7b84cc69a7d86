"""A package answers: for files, and over HTTP. Torch-free."""
