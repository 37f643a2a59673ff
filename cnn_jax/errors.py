"""The one exception for mistakes that a user can mend."""


class UserError(ValueError):
    """A mistake in the input: its message says what is wrong, where, and how to mend it.

    Launchers print the message as one plain sentence and exit with status 2.
    """
