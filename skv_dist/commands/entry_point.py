"""Entry points of the installed commands: a `UserError` is one line and exit code 2."""

import functools
import os
import sys
import warnings
from collections.abc import Callable

from skv_dist.errors import UserError


def entry_point(main: Callable[[list[str]], int]) -> Callable[[], int]:
    """Turn ``main(argv) -> exit code`` into an entry point on which a `UserError` is one line and exit code 2.

    A process that sits in a collective beside a failed one would wait for its time-out, so once a process group
    exists the failing process leaves at once (`os._exit`), and its launcher ends the others.
    """

    @functools.wraps(main)
    def run() -> int:
        # On import Megatron-core lists every optional package that it did not find.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
        # DeepSpeed calls collectives by names that torch has deprecated.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        # Checkpoint tools read and write in one process on purpose.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        try:
            return main(sys.argv[1:])
        except UserError as error:
            print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            return 130
        torch = sys.modules.get("torch")
        if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
            sys.stdout.flush()
            os._exit(2)
        return 2

    return run
