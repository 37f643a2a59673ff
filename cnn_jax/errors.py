"""What stops a run: a mistake that the user can mend, or something that went wrong."""


class UserError(ValueError):
    """A mistake in the input: its message says what is wrong, where, and how to mend it.

    Launchers print the message as one plain sentence and exit with status 2.
    """


class RunFailed(RuntimeError):
    """A run cannot go on: its message says why and what to try.

    Launchers print the message as one plain sentence and exit with status 1.
    """
