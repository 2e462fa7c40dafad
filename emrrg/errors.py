"""The one exception that the commands turn into a single line and exit status 2."""


class InputError(ValueError):
    """Something that the user gave (file, record, flag, folder) cannot be used.

    The message is one line: what was wrong, where (the file, record id or flag), what to do.
    """
