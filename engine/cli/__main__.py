"""`python -m millrace.engine.cli` is `millrace`."""

from millrace.engine.cli.app import main

main()
