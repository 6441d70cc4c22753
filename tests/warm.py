"""`python`, but with the stack already imported: what tests start in place of `sys.executable`.

Importing torch, Megatron-core, DeepSpeed and Streaming takes some 4 seconds of a core, and the
tests start hundreds of processes. `warm_python` starts one process that imports them once, and
returns a small program that asks it for a fork. Each fork has its own arguments, environment,
directory, umask and files; it dies a moment after the program and receives the program's signals,
SIGSTOP excepted.
Variables that libraries read when they are imported have no effect, so tests of imports, hangs,
installations and schedulers start Python itself.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from functools import cache
from pathlib import Path
from typing import NoReturn

_WHOLE_STACK = (
    # It keeps the name of the real interpreter, for what it spawns.
    "multiprocessing.spawn",
    "calm_dist.data.latents",
    "calm_dist.evaluation.evaluate",
    "calm_dist.inference.generate",
    "calm_dist.training.autoencoder",
    "calm_dist.training.language_model",
    # The optimizer imports it when it is built.
    "torch._dynamo",
    "torch.distributed.launcher.api",
    # Each report imports them.
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
)

_OPTIONS = ("-u", "-m", "-c", "-")
_ROOT = Path(__file__).parents[1]
_FORWARDED = [int(getattr(signal, f"SIG{name}")) for name in ("HUP", "INT", "TERM", "USR1", "USR2")]
# Without site-packages it starts in 15 ms.
_CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
mask = os.umask(0)
os.umask(mask)
request = {{"arguments": sys.argv[1:], "environment": dict(os.environ), "directory": os.getcwd(),
           "umask": mask}}
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    socket.send_fds(connection, [b"files"], [0, 1, 2])
    connection.sendall(json.dumps(request).encode() + b"\\n")
    answers = connection.makefile("rb")
    process = int(answers.readline())
    for number in {forwarded}:
        signal.signal(number, lambda number, frame: os.kill(process, number))
    code = int(answers.readline() or b"-9")
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@cache
def warm_python() -> str:
    """The program, with its process; both last as long as this process."""
    directory = tempfile.TemporaryDirectory(prefix="warm_")
    address, program = f"{directory.name}/socket", Path(directory.name) / "python"
    # It ends when its standard input does, which is when this process ends, however it ends.
    server = subprocess.Popen(
        [sys.executable, __file__, address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert server.stdin is not None and server.stdout is not None
    if server.stdout.readline() != b"ready\n":
        raise RuntimeError(f"the warm process ended with code {server.wait()}")
    program.write_text(
        _CLIENT.format(python=sys.executable, address=address, forwarded=_FORWARDED),
        encoding="utf-8",
    )
    program.chmod(0o700)
    atexit.register(directory.cleanup)
    atexit.register(server.stdin.close)
    return str(program)


def _serve(address: str) -> None:
    # Collections while modules are loaded find nothing, and take longer than the loading where
    # memory is slow; one in a fork would write to every page that it shares.
    gc.disable()
    for module in _WHOLE_STACK:
        importlib.import_module(module)
    # The head imports it when it is built.
    from calm_dist.compat.deepspeed import import_deepspeed

    import_deepspeed()
    # Its engine imports it when it is built.
    importlib.import_module("deepspeed.module_inject.auto_ep_layer")
    from gloo_device import share_device

    share_device()
    gc.freeze()
    # A training asks whether there are any; to count a million takes a tenth of a second.
    frozen = gc.get_freeze_count()
    gc.get_freeze_count = lambda: frozen
    gc.enable()
    if len(os.listdir("/proc/self/task")) != 1:
        raise SystemExit("an import started a thread: forks of this process would not be safe")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([0, listener.fileno()], [], [])
        if 0 in ready:
            return
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _supervise(connection, str(Path(address).with_name("python")))
            os._exit(0)
        connection.close()


def _supervise(connection: socket.socket, program: str) -> None:
    """Fork the process of a request and tell how it ended; it dies with who asked for it."""
    _, files, _, _ = socket.recv_fds(connection, 5, 3)
    request = json.loads(connection.makefile("rb").readline())
    process = os.fork()
    if process == 0:
        connection.close()
        os.umask(request["umask"])
        _become(program, request["arguments"], request["environment"], request["directory"], files)
    for file in files:
        os.close(file)
    connection.sendall(b"%d\n" % process)
    ended = os.pidfd_open(process)
    ready, _, _ = select.select([connection.fileno(), ended], [], [])
    if connection.fileno() in ready:
        os.kill(process, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(b"%d\n" % code)


def _become(
    program: str,
    arguments: list[str],
    environment: dict[str, str],
    directory: str,
    files: list[int],
) -> NoReturn:
    """Be the process that `python ARGUMENTS` would have started."""
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    # Line by line, whatever they lead to.
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, buffering=1, closefd=False) for number, mode in enumerate("rww")
    )
    os.environ.clear()
    os.environ.update(environment)
    # Read from TMPDIR again.
    tempfile.tempdir = None
    for option in filter(None, environment.get("PYTHONWARNINGS", "").split(",")):
        warnings.simplefilter(option)  # type: ignore[arg-type]
    os.chdir(directory)
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    changed = any((Path(path) / "calm_dist").is_dir() and not _is_ours(path) for path in paths)
    if changed or (arguments[0].startswith("-") and arguments[0] not in _OPTIONS):
        os.execv(sys.executable, [sys.executable, *arguments])
    sys.path[1:1] = [path for path in paths if path not in sys.path]
    # What it starts itself is a fork, too.
    sys.executable = program
    code = 1
    try:
        _execute(arguments)
        code = 0
    except SystemExit as exit_:
        if isinstance(exit_.code, str):
            print(exit_.code, file=sys.stderr)
        else:
            code = int(exit_.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        # As at the interpreter's end.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _is_ours(path: str) -> bool:
    """Whether ``path`` has the package that is imported here, not a changed copy."""
    return Path(path).samefile(_ROOT)


def _execute(arguments: list[str]) -> None:
    if arguments[0] == "-u":
        arguments = arguments[1:]
    first, rest = arguments[0], arguments[1:]
    if first == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first in ("-c", "-"):
        code = rest.pop(0) if first == "-c" else sys.stdin.read()
        sys.argv, sys.path[0] = [first, *rest], ""
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = arguments, str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    _serve(sys.argv[1])
