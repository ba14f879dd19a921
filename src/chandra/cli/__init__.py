"""The `chandra` command: parse, call `llm.py` or `store`, print.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 does not fit.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from chandra import __version__
from chandra.cli import plan, ps, run, store
from chandra.errors import ChandraError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = _parse(_parser(), argv)
    try:
        return int(arguments.run(arguments))
    except ChandraError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"chandra: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader went away (`chandra list | head`); what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if arguments.debug:
            raise
        print(
            f"chandra: {type(error).__name__}: {error}\n  this is a fault in Chandra: --debug shows where",
            file=sys.stderr,
        )
        return 1


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """As `parse_args`, but a prompt may also come after options that follow the model's name."""
    arguments, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(arguments, "prompt")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.prompt += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chandra", description="Run language models inside the memory you have.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"chandra {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    run.add_commands(commands, common)
    plan.add_commands(commands, common)
    store.add_commands(commands, common)
    ps.add_commands(commands, common)
    return parser
