"""`python -m fieldmark`, which torchrun starts."""

from fieldmark.cli import main

main()
