"""Errors that are the user's to mend."""

import contextlib


class UserError(Exception):
    """Bad input: what is wrong with which file or value, and what to do about it, in one line.

    argument: the argument of a function, or the field of a config, that was bad. The boundary
    (`dalle2.cli`) makes the flag of it and exits with code 2. is_local: of several processes this
    one alone knows of it; otherwise each raises it, and the first prints it.
    """

    is_local = False

    def __init__(self, message, argument=None):
        super().__init__(message)
        self.argument = argument

    def __str__(self):
        message = super().__str__()
        return f"{self.argument}: {message}" if self.argument else message


@contextlib.contextmanager
def rename_argument(**names):
    """Renames the argument of a UserError from within: {the callee's name: the caller's}."""
    try:
        yield
    except UserError as error:
        error.argument = names.get(error.argument, error.argument)
        raise
