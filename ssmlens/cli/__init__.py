"""The command line. ``main`` runs one command and returns its exit code.

0 success, 1 a check that failed (``verify``), 2 input that cannot be used: then standard error holds exactly one
sentence. Everything heavy is imported inside the commands, so that ``--help`` stays quick.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

import typer

from ssmlens.cli import (
    analyse,
    attribution,
    capacity_commands,
    lyapunov_commands,
    memory_commands,
    pages,
    precision_commands,
    run,
    selfcheck,
    sensitivity_commands,
)
from ssmlens.errors import SsmlensError

__all__ = ["app", "main"]

UNREAD = 1
BAD_INPUT = 2
INTERRUPTED = 130

app = typer.Typer(
    name="ssmlens",
    help="See what a state space model remembers: hidden states, implicit attention and memory, with the "
    "reconstruction error beside every number.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    run.trace,
    analyse.attend,
    attribution.attribute,
    attribution.faithfulness,
    run.verify,
    selfcheck.selfcheck,
    pages.report,
    pages.models,
    pages.app,
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(memory_commands.app, name="memory")
app.add_typer(lyapunov_commands.app, name="lyapunov")
app.add_typer(capacity_commands.app, name="capacity")
app.add_typer(precision_commands.app, name="precision")
app.add_typer(sensitivity_commands.app, name="sensitivity")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; ``arguments`` are those of the process by default."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A token that the terminal's encoding lacks is shown by its code, not by a traceback.
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="ssmlens", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except SsmlensError as error:
        return _refuse(str(error))
    except BrokenPipeError:
        # The reader of our output has left, as `head` does; Python would complain when it flushes at exit.
        # Typer ends the process with the same code when a command meets this while it prints.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _refuse(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        # Usage errors; typer brings its own copy of click, so they are known by what they can do.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            message = error.format_message()
            return _refuse(message) if message else BAD_INPUT
        raise


def _refuse(message: str) -> int:
    sentence = " ".join(message.split()).rstrip(".")
    print(f"error: {sentence}", file=sys.stderr)
    return BAD_INPUT
