"""Starting the processes of a run on this machine, as torchrun does."""

import logging
import signal
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fieldmark.errors import Interrupted, Preempted

_FAREWELL_S = 120  # for an update and a checkpoint after a signal; then processes are killed


def launch(num_processes: int, arguments: Sequence[str]) -> int:
    """Run `fieldmark ARGUMENTS` in so many processes; return the exit status of the run.

    That of the process which failed first; 128 + N for one that was killed by signal N.
    """
    # Its own tables repeat what the processes say of themselves.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    signals = ["SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2"]  # passed on
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        signals.append("SIGHUP")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        local_addr="localhost",
        signals_to_handle=",".join(signals),
        shutdown_timeout=_FAREWELL_S,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "fieldmark", *arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    except SignalException as error:
        stopped = Interrupted if error.sigval == signal.SIGINT else Preempted
        return stopped.exit_status
    return 0
