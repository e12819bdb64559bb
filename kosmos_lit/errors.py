"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake in a config, a command or an input; its message says where, which values, and what to do.

    `main.py` prints it as one message without a traceback and exits with code 2.
    """
