"""The two reasons for which a run stops: a usage error, or a failure."""


class UserError(ValueError):
    """A usage error: its message says what is wrong, where, and how to mend it.

    Launchers print the message as one plain sentence and exit with status 2.
    """


class RunFailed(RuntimeError):
    """A run cannot go on: its message says why and what to try.

    Launchers print the message as one plain sentence and exit with status 1.
    """
