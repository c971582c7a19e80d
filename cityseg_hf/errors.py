"""What a user can do wrong, and the exit statuses that batch scripts act on."""

EXIT_USER_ERROR = 2
"""The user's mistake: one line that names the thing and the mend, nothing lost."""

EXIT_STOPPED = 75
"""Stopped by a signal after saving; the same command goes on from there. (75 is EX_TEMPFAIL of sysexits.h.)"""


class UserError(Exception):
    """A mistake of the user's: one line that names the thing and says how to mend it. Scripts print it and exit 2."""


class LocalFault(UserError):
    """A ``UserError`` that one process of several may meet alone, such as a broken image in its share of the data."""


def one_line(error: BaseException) -> str:
    """What an error of a library says, in one line of 300 characters at most."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


class ProcessLost(Exception):
    """Another process of the run is gone, and this one cannot go on without it. Scripts print it and exit 1."""


class Stopped(Exception):
    """The run was asked to stop by a signal and has saved its state. Scripts print it and exit 75."""
