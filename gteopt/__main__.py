"""`python -m gteopt`: the command line."""

from gteopt.cli.app import main

main()
