"""Exit statuses of the command ``cure``."""

from enum import IntEnum


class ExitStatus(IntEnum):
    """How a command ended, as the shell sees it."""

    FAILED_CHECK = 1
    USER_MISTAKE = 2
    UNFINISHED = 3
    NOT_MET = 4
    INTERRUPTED = 130
