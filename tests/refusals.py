"""How a command of rq refuses what a user can mend: exit code 2, and one line on standard error that says what to do."""

import contextlib
import io
from collections.abc import Callable

import pytest


def refusal(main: Callable[[list[str]], None], *arguments: object) -> str:
    """The line with which a command ends that refuses its input; the log may stand before it."""
    with pytest.raises(SystemExit) as stopped, contextlib.redirect_stderr(io.StringIO()) as written:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    assert "Traceback" not in written.getvalue()
    last = written.getvalue().splitlines()[-1]
    assert last.startswith("rq.")
    return last
