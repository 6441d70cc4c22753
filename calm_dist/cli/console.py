"""Shared by all command-line tools: exit codes for errors, option types, JSON output."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from calm_dist.errors import (
    EXIT_BAD_INPUT,
    EXIT_DIVERGED,
    EXIT_HUNG,
    EXIT_PEER_LOST,
    EXIT_STOPPED,
    EXIT_UNREACHABLE,
    HungError,
    PeerLostError,
    RecipeError,
    StoppedError,
    TrainingDivergedError,
    UnreachableError,
    UserError,
    is_lost_mount,
    shortened,
)
from calm_dist.files import (
    FULL,
    check_directory_is_writable,
    check_file_is_writable,
    finite,
)
from calm_dist.log import outlives_console, show_on_console
from calm_dist.redact import redact


def run(main: Callable[[], int | None]) -> None:
    """Run a tool's ``main`` and exit with 0, its own code, or the code of its error.

    2 for a `UserError` or a file that cannot be used, 3 for a `PeerLostError`, 4 for a
    `TrainingDivergedError`, 5 for a `HungError`, 6 for an `UnreachableError` or a file on a lost
    mount, 75 for a `StoppedError`; all with a message instead of a traceback.
    """
    _silence_library_warnings()
    show_on_console()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names may have bytes that are not text; stderr escapes them like this by default.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main()
        # Flush here: at exit, the interpreter could only print a traceback.
        sys.stdout.flush()
    except UserError as error:
        _report(error)
        code = EXIT_UNREACHABLE if isinstance(error, UnreachableError) else EXIT_BAD_INPUT
    except BrokenPipeError:
        if outlives_console():
            # Of another pipe: a training's output raises no errors.
            raise
        # The reader of our output (head, less) has exited: not an error of ours.
        sys.stderr.close()
        code = 0
    except OSError as error:
        if error.filename is None and error.errno not in FULL:
            raise
        place = "output" if error.filename is None else error.filename
        print(redact(f"error: {place}: {error.strerror}"), file=sys.stderr, flush=True)
        code = EXIT_UNREACHABLE if is_lost_mount(error) else EXIT_BAD_INPUT
    except (PeerLostError, TrainingDivergedError) as error:
        print(redact(f"error: {error}"), file=sys.stderr, flush=True)
        code = EXIT_PEER_LOST if isinstance(error, PeerLostError) else EXIT_DIVERGED
    except HungError:
        # The rank that detected it has already printed the message.
        code = EXIT_HUNG
    except StoppedError as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped, file=sys.stderr, flush=True)
        code = EXIT_STOPPED
    except KeyboardInterrupt:
        code = 130
    _drop_what_stdout_refuses()
    sys.exit(code or 0)


def _drop_what_stdout_refuses() -> None:
    """Discard output that cannot be written: the interpreter would try again at exit and replace
    the exit code with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _silence_library_warnings() -> None:
    """Hide the dozens of warnings of libraries about their own deprecations and optional packages,
    which do not concern the user of a tool. Errors and warnings about our code are kept;
    ``PYTHONWARNINGS=default`` or ``python -W`` shows all."""
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"(?!calm_dist\b|__main__$)")


def announce(text: str) -> None:
    """Print on a terminal, but not into logs, what a tool does before its first result."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def _report(error: UserError) -> None:
    """Print an error; only rank 0 prints one that every rank finds, as in recipe or files."""
    same_everywhere = isinstance(error, RecipeError) or getattr(error, "reported", False)
    if not same_everywhere or os.environ.get("RANK", "0") == "0":
        print(redact(f"error: {shortened(str(error))}"), file=sys.stderr, flush=True)


def at_least(minimum: int) -> Callable[[str], int]:
    """A type for argparse: a whole number from ``minimum`` to the largest seed, 2^63 - 1."""

    def number(text: str) -> int:
        value = int(text)
        if not minimum <= value < 2**63:
            raise argparse.ArgumentTypeError(
                f"{value}: give a whole number from {minimum} to 2^63 - 1"
            )
        return value

    return number


def between(smallest: float, largest: float) -> Callable[[str], float]:
    """A type for argparse: a number from ``smallest`` to ``largest``."""

    def number(text: str) -> float:
        value = float(text)
        if not smallest <= value <= largest:
            limits = f"{smallest:g} to {largest:g}".replace("e+", "e")
            raise argparse.ArgumentTypeError(f"{text}: give a number from {limits}")
        return value

    return number


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--device`` of a tool that computes in one process."""
    parser.add_argument(
        "--device",
        type=device,
        action=_ChooseDevice,
        default="auto",
        metavar="auto|cpu|cuda[:N]",
        help="auto: a GPU if there is one (default); cuda:N: the GPU of that number",
    )


def add_document_tokens(parser: argparse.ArgumentParser) -> None:
    """Add the options ``--begin-token`` and ``--end-token`` of a tool that uses a model."""
    for role in ("begin", "end"):
        parser.add_argument(
            f"--{role}-token",
            metavar="NAME",
            help=f"the tokenizer's token that {role}s documents (default: the recipe's)",
        )


def utf8_text(text: str) -> str:
    """A type for argparse: text. Bytes that are not UTF-8 arrive as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8") from None
    return text


class _ChooseDevice(argparse.Action):
    """Hides the GPUs if the CPU is chosen, before torch is imported: Megatron-core uses any GPU it
    sees, which may have no memory left."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if values == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        setattr(namespace, self.dest, values)


def device(text: str) -> str:
    """A type for argparse: auto, cpu, cuda or cuda:N."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text}: give auto, cpu, cuda, or cuda:N for GPU N")
    return text


def writable_file(text: str) -> str:
    """A type for argparse: a file for the tool's result, checked immediately to be writable."""
    return _writable(text, check_file_is_writable, "file")


def writable_directory(text: str) -> str:
    """A type for argparse: a writable directory, which need not exist yet."""
    return _writable(text, check_directory_is_writable, "directory")


def image_file(text: str) -> str:
    """A type for argparse: a writable file for a plot."""
    if not text.endswith((".svg", ".png")):
        raise argparse.ArgumentTypeError(f"{text}: give a file name that ends in .svg or .png")
    return writable_file(text)


def _writable(text: str, check: Callable[[str], None], what: str, or_else: str = "") -> str:
    if not text:
        raise argparse.ArgumentTypeError(f"is empty: give a {what}{or_else}")
    try:
        check(text)
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{text}: cannot be written ({error.strerror}); give a writable {what}{or_else}"
        ) from error
    return text


def add_json(
    parser: argparse.ArgumentParser, text: str = "write JSON to F, or to stdout for -"
) -> None:
    """Add the option ``--json`` of a tool, whose value goes to `write_json`.

    A file that cannot be written is refused while the command line is parsed, before any work.
    """

    def target(value: str) -> str:
        if value == "-":
            return value
        return _writable(value, check_file_is_writable, "file", ", or - for stdout")

    parser.add_argument("--json", metavar="F", type=target, help=text)


def write_json(value: Any, target: str | Path) -> None:
    """Write ``value`` as JSON to a file, or to stdout for ``-``; non-finite numbers become null.

    Tools print their result first, so that it is not lost if the disk has filled up since.

    Raises:
        UserError: the file cannot be written.
    """
    _write(json.dumps(finite(value), indent=2, allow_nan=False) + "\n", target)


def write_json_lines(values: Iterable[Any], target: str | Path, *, append: bool = False) -> None:
    """As `write_json`, one value per line; ``append`` keeps the lines that the file has."""
    lines = (json.dumps(finite(value), allow_nan=False) for value in values)
    _write("".join(f"{line}\n" for line in lines), target, append)


def _write(text: str, target: str | Path, append: bool = False) -> None:
    if str(target) == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    try:
        path = Path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if append else "w", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise UserError(
            f"--json {target}: cannot write ({error.strerror}); "
            "give a writable file or - for stdout"
        ) from error
