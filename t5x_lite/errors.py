"""The one error that a user is meant to read."""


class UserError(ValueError):
    """What the user gave cannot work: one line with the number and the remedy.

    The command line prints the message alone and exits with 2; anything else that escapes is a bug.
    """
