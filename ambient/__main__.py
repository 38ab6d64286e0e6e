"""`python -m ambient`: the command line."""

from ambient.cli import main

main()
