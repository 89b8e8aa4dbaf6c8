"""`python -m nasray` is `nasray`."""

from nasray.cli.main import main

main()
