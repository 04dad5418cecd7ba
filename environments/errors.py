"""The one error that a user is meant to mend."""


class InputError(ValueError):
    """Something a user wrote or pointed at cannot be used.

    The message is one line: the rule, what was expected, what came, and the remedy. A rollout stops at it instead of
    blaming an episode, and a command line prints it and exits with code 2.
    """
