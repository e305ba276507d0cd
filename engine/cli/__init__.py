"""The command line: `millrace serve`, `generate`, `chat`, `tokenize`, `bench`, `plan`, `doctor` and
`compile`.

`millrace.engine.cli:main` is the entry point. One file a command; each imports what it runs when it
runs, so that `--help` and a mistyped option cost no torch.
"""

from millrace.engine.cli.app import app, main

__all__ = ["app", "main"]
