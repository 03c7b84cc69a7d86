"""`fieldmark`, and `python -m fieldmark`, which torchrun starts."""

import atexit
import os
import sys

from fieldmark import cli


def main() -> None:
    """Run the command line; a rank of several ends without the interpreter's own finalisation.

    A thread of gloo may let go of its last tensor as late as that, and asking for the interpreter's
    lock then aborts the process: its status would be lost (pytorch/pytorch issue 190489).
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        cli.main()
        return
    status = 0
    try:
        cli.main()
    except SystemExit as done:
        status = done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:  # noqa: BLE001  told as the interpreter tells it
        sys.excepthook(*sys.exc_info())
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
