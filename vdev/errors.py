"""The two ways a command ends badly. The text is one line a newcomer understands: the cause, and the fix."""


class Misuse(Exception):
    """The command line or the configuration is wrong: exit status 2. Each argument is one error line."""


class Failure(Exception):
    """The command was right and could not be carried out: exit status 1."""
