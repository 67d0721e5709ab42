"""The entry point: runs a verb and turns every error into one line and an exit status."""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer

from qat.cli import calibrate, compare, encodings, env, export, package, plan, recipe, run, targets, verify
from qat.errors import QatError

#: exit statuses besides those of the errors themselves
USAGE, INTERRUPTED, DEFECT = 2, 130, 1


def make_app() -> typer.Typer:
    """Return the command line with all its verbs."""
    app = typer.Typer(
        name="qat",
        help="From a float PyTorch model to a verified integer one.",
        epilog="Exit status: 0 done, 1 a check did not hold, 2 wrong usage or bad input. --debug: tracebacks.",
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for verb in (run, plan, calibrate, export, package, verify, compare, targets, env):
        verb.register(app)
    for group in (recipe, encodings):
        group.register(app)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        Exit status: 0 done, 1 a check did not hold (or a defect of `qat`), 2 wrong usage or bad input, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    command = typer.main.get_command(make_app())
    try:
        # not `command.main`: what that makes of an interrupt or a closed pipe differs between versions of typer
        with _one_line_warnings(debug), command.make_context("qat", arguments) as context:
            command.invoke(context)
        sys.stdout.flush()
    except Exception as error:  # noqa: BLE001 - the one place where everything ends
        if debug:
            traceback.print_exc()
        return _explain(error)
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        _complain("interrupted")
        return INTERRUPTED
    return 0


def _explain(error: Exception) -> int:
    """Tell what went wrong in one line and return the exit status."""
    if isinstance(error, QatError):
        _complain(str(error))
        return error.exit_status
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, typer.Abort):
        _complain("interrupted")
        return INTERRUPTED
    # typer's usage errors: their classes are public in none of its versions
    if hasattr(error, "format_message"):
        context = getattr(error, "ctx", None)
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
        else:
            _complain(f"{error.format_message().rstrip('.')}; see {context.command_path if context else 'qat'} --help")
        return USAGE
    if isinstance(error, BrokenPipeError):
        # the reader of a pipe has seen enough; what is still buffered must not fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        _complain(
            f"cannot write {error.filename or 'a file'} ({error.strerror}); free some space or choose another folder"
        )
        return USAGE
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        _complain("not enough memory; lower data.batch_size or export.onnx.samples")
        return USAGE
    cause = str(error).strip().splitlines()
    _complain(
        f"defect of qat: {type(error).__name__}: {cause[0] if cause else ''}; run again with --debug and report it"
    )
    return DEFECT


def _complain(message: str) -> None:
    line = " ".join(message.split())
    # of several processes (torchrun) each speaks for itself
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    who = f" (process {rank} of {size})" if rank is not None and size != "1" else ""
    print(f"qat: error{who}: {line}", file=sys.stderr)


@contextmanager
def _one_line_warnings(debug: bool) -> Iterator[None]:
    """Show the warnings of `qat` as one line each; those of libraries only with --debug."""
    package = str(Path(__file__).resolve().parent.parent)
    # of several processes the first one warns for all: they do the same
    others = os.environ.get("RANK", "0") != "0"

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], filename: str, *rest: object) -> None:
            if debug:
                shown(message, category, filename, *rest)  # type: ignore[arg-type]
            elif filename.startswith(package) and issubclass(category, UserWarning) and not others:
                print(f"qat: warning: {' '.join(str(message).split())}", file=sys.stderr)

        warnings.showwarning = show  # type: ignore[assignment]
        yield
