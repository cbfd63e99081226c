"""The one error type for what a user can cause and mend."""


class UserError(ValueError):
    """Says in one line what was wrong, where, and what to do. The command lines print it and exit with status 2."""
