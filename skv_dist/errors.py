"""Errors that are meant for the user: one line, no traceback, a non-zero exit (`skv_dist.commands.entry_point`)."""


class UserError(Exception):
    """Something the user can mend. The message is one sentence that names the file, key or line."""


def cause_in_one_line(problem: BaseException) -> str:
    """What went wrong, for a sentence of ours: what the system said if it is behind ``problem``, else its last line."""
    for cause in (problem, problem.__cause__, problem.__context__):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    lines = [line for line in str(problem).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(problem).__name__
