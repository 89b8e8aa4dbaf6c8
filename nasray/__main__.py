"""`python -m nasray` is `nasray`."""

from nasray.cli import main

main()
