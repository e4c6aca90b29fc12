"""The one exception of the project that is meant for a person: what was given, where, and what would work."""


class Refusal(Exception):  # noqa: N818 - it is an answer, not a fault
    """What was asked cannot be done as asked.

    The message is one line that names the value, the place and the mend. Command lines print it as
    ``error: …`` and exit with code 2; nothing has been changed when it is raised.
    """


class Busy(Refusal):
    """Somebody else is at work there, who may soon be gone."""
