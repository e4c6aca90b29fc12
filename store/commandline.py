"""How every command of the project starts and ends: a config dataclass becomes options, a Refusal one line.

A command is a function with one parameter, a frozen dataclass. The text under each field of the dataclass is
its ``--help``; fields marked ``tyro.conf.Positional`` are given without a name.
"""

import contextlib
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tyro

from store.errors import Refusal

STYLE = (
    tyro.conf.OmitArgPrefixes,
    tyro.conf.OmitSubcommandPrefixes,
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.HelptextFromCommentsOff,
)

Command = Callable[[Any], int | None]


def parse(config_type: type, program: str, description: str, argv: Sequence[str], default: Any = None) -> Any:
    """The options of ``argv`` as an instance of ``config_type`` (unset fields come from ``default``).

    Raises
    ------
    Refusal
        An option or value is not known, or a needed one is missing.
    """
    given = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(config_type, prog=program, description=description, args=list(argv), config=STYLE, **given)
    except SystemExit as end:
        if not end.code:
            raise
        # The parser draws a box with a title; a refusal is one line, here as everywhere.
        plain = re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue())
        _title, *lines = [line for row in plain.splitlines() if (line := row.strip("│╭╮╰╯─ "))]
        raise Refusal(" ".join(lines)) from end


def config_type_of(command: Command) -> type:
    """The dataclass that a command takes: the annotation of its only parameter."""
    (parameter,) = inspect.signature(command, eval_str=True).parameters.values()
    return parameter.annotation


def finish(work: Callable[[], int | None]) -> None:
    """Run ``work`` and leave the process with its exit code: 0 done, 2 refused, 130 interrupted."""
    try:
        code = work() or 0
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except KeyboardInterrupt:
        print("interrupted: what was committed is kept, the same command goes on from there", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    sys.exit(code)


def run(program: str, command: Command, argv: Sequence[str] | None = None) -> None:
    """Run a program of one command; the docstring of its config is the head of ``--help``."""
    argv = sys.argv[1:] if argv is None else argv
    config_type = config_type_of(command)
    finish(lambda: command(parse(config_type, program, inspect.getdoc(config_type) or "", argv)))


def route(program: str, about: str, commands: Mapping[str, Command], argv: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names; without one, or with ``--help``, list them all."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(f"usage: {program} COMMAND [OPTIONS]\n\n{about}\n\ncommands (each has --help):")
        for known, command in commands.items():
            print(f"  {known:<10} {(inspect.getdoc(config_type_of(command)) or '').splitlines()[0]}")
        sys.exit(0 if argv else 2)
    if name not in commands:
        print(f"error: {program} has no command {name!r}; it has: {', '.join(commands)}", file=sys.stderr)
        sys.exit(2)
    run(f"{program} {name}", commands[name], argv[1:])
