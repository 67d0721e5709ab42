"""The command line: `qat VERB ...`; one file a verb."""

from qat.cli.main import main

__all__ = ["main"]
