"""What a user can do wrong, and the exit statuses that batch scripts act on."""

EXIT_USER_ERROR = 2
"""The user's mistake: one line that names the thing and the mend, nothing lost."""

EXIT_STOPPED = 75
"""Stopped by a signal after saving; the same command goes on from there. (75 is EX_TEMPFAIL of sysexits.h.)"""


class UserError(Exception):
    """A mistake of the user's: one line that names the thing and says how to mend it. Scripts print it and exit 2."""


class Stopped(Exception):
    """The run was asked to stop by a signal and has saved its state. Scripts print it and exit 75."""
