"""A command in this process: as `tests.conftest.puyu`, without the second that a new interpreter takes."""

import contextlib
import io

from puyu.cli.main import main


def run(*arguments, code=0):
    """Everything that the command prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        found = main([str(argument) for argument in arguments])
    assert found == code, said.getvalue()
    return said.getvalue()
