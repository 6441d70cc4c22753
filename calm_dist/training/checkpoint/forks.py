"""Fork the process that writes a checkpoint, and make sure that it runs.

In CPython 3.11 a forked child can hang before it executes its first line: it waits for the lock of
the interpreter's thread list, which another thread of the parent held at the fork
(``_PyThreadState_DeleteExcept``). Such a child would never write, and would keep the descriptors of
its parent open.
"""

from __future__ import annotations

import logging
import os
import select
from functools import partial
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest

from calm_dist.log import NOTE

_log = logging.getLogger(__name__)

# A child reports within milliseconds; a slow one is merely forked again.
_SECONDS_UNTIL_IT_RUNS = 5.0
_TRIES = 3


def schedule(calls: AsyncCallsQueue, request: AsyncRequest) -> None:
    """Schedule a request, and make sure that its process, if it has one, runs.

    Raises:
        OSError: no process can be forked, or none of several started; nothing is scheduled.
    """
    if request.async_fn is None:
        _schedule(calls, request)
        return
    for _ in range(_TRIES):
        reader, writer = os.pipe()
        try:
            _schedule(calls, _reporting(request, writer))
            os.close(writer)
            writer = -1
            process = calls.async_calls[-1].async_caller.process
            # The pipe also becomes readable if the child ends without a report.
            if _is_readable(reader, _SECONDS_UNTIL_IT_RUNS):
                return
        finally:
            os.close(reader)
            if writer >= 0:
                os.close(writer)
        process.kill()
        process.join()
        calls.async_calls.pop()
        calls.call_idx -= 1
        _log.log(NOTE, f"process {process.pid} did not start to write a checkpoint; forking again")
    raise OSError(f"{_TRIES} forked processes did not start")


def _is_readable(descriptor: int, seconds: float) -> bool:
    # Not select, whose descriptors end at 1,024: a rank has a socket to each of its peers.
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


def _schedule(calls: AsyncCallsQueue, request: AsyncRequest) -> None:
    try:
        calls.schedule_async_request(request)
    except OSError:
        calls.call_idx -= 1
        raise


def _reporting(request: AsyncRequest, writer: int) -> AsyncRequest:
    return request._replace(async_fn=partial(_report_and_run, writer, request.async_fn))


def _report_and_run(writer: int, function: Any, *arguments: Any, **named: Any) -> None:
    """Report to the parent, then run ``function``; runs in the forked process."""
    os.write(writer, b"1")
    os.close(writer)
    function(*arguments, **named)
