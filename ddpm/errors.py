"""Our two errors: what the user can put right, and work that failed."""


class BadInput(ValueError):
    """A file or argument that cannot be used: says which, what was found and what is needed, in one line."""


class WorkFailed(RuntimeError):
    """Work that was asked for rightly and did not succeed: says what happened and what to try, in one line."""
