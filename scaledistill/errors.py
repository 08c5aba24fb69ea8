"""Errors that end a run with a documented exit code.

A message names the setting, the actual value, the expected one and the remedy. Any other exception
is a bug.

A module that gets plain parameters does not know which setting, argument or option they come from:
it raises `SettingError` (or `SourceError`) with its own parameter's name. The callers that know the
public name rename it by `named`, and `carry_out` makes messages and exit codes of errors.
"""

from __future__ import annotations

import difflib
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

EXIT_DONE = 0
EXIT_CONFIG = 2
EXIT_ENVIRONMENT = 3
EXIT_DIVERGED = 4
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: "1 rank", "1,024 ranks", "2 micro-batches"."""
    plural = plural or noun + ("es" if noun.endswith(("ch", "s", "x")) else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def near_misses(
    found: str, known: Iterable[str], *, at_most: int, cutoff: float = 0.6
) -> list[str]:
    """Return the known names most like a wrong one, the most similar first.

    `cutoff` is the least similarity, from 0 (anything) to 1 (equal).
    """
    return difflib.get_close_matches(found, list(known), n=at_most, cutoff=cutoff)


def near_miss(found: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the known name most like a wrong one; None if none is alike (see `near_misses`)."""
    return next(iter(near_misses(found, known, at_most=1, cutoff=cutoff)), None)


def did_you_mean(near: object | None) -> str:
    """Return the end of a message that suggests `near`; "" for None."""
    return "" if near is None else f"; did you mean {near}?"


@dataclass(frozen=True)
class Field:
    """A parameter that a message mentions, with its value if the message states one."""

    name: str
    value: object = ...

    def __str__(self) -> str:
        is_option = self.name.startswith("-")
        if self.value is ... or (is_option and self.value is True):
            return self.name
        return f"{self.name}{' ' if is_option else '='}{self.value!r}"

    def renamed(self, names: Names) -> Field:
        """Return the field under its new name; `pairs.qq` follows `pairs`.

        A new value replaces a stated one only. An option of a command line has no parts.
        """
        root, dot, rest = self.name.partition(".")
        inner = dot + rest
        if self.name in names:
            root, inner = self.name, ""
        elif root not in names:
            return self
        new = names[root]
        name, value = (new, ...) if isinstance(new, str) else (new.name, new.value)
        if self.value is ... or value is ...:
            value = self.value
        return Field(name if name.startswith("-") else name + inner, value)


Names = Mapping[str, str | Field]
"""New names of parameters; a `Field` with a value replaces the value as well."""
Text = str | Field | Sequence["str | Field"]
"""A text, or its pieces, so that the fields in it can be renamed."""


class _MessageError(Exception):
    """An error whose message consists of texts and fields, its arguments."""

    @property
    def pieces(self) -> tuple[str | Field, ...]:
        """The message in order."""
        return self.args

    def __str__(self) -> str:
        return "".join(map(str, self.pieces))

    def rename(self, names: Names) -> None:
        """Rename the fields in the message."""
        self.args = _renamed(self.args, names)


class ConfigError(_MessageError, ValueError):
    """A setting is wrong or settings contradict each other; raised before any training."""

    exit_code = EXIT_CONFIG


class DataError(_MessageError, RuntimeError):
    """Data, a model folder, the disk or the machine does not meet the run's needs."""

    exit_code = EXIT_ENVIRONMENT


class _FieldError(_MessageError):
    """An error about one parameter, named as the function that raises it calls it.

    The message is "field=found expected; remedy". A function that passes its own parameter on under
    another name renames it by `named`.
    """

    def __init__(
        self, field: str, found: object = ..., expected: Text = "", remedy: Text = ""
    ) -> None:
        """Keep the parts of the message.

        Args:
            field: the parameter's name in the function that raises the error.
            found: its value; left out if the message should not state it.
            expected: what is wrong or expected; continues the sentence, or starts with a colon or
                comma.
            remedy: what to do.
        """
        super().__init__(field, found, expected, remedy)
        self.field, self.found = field, found
        self.expected, self.remedy = _pieces_of(expected), _pieces_of(remedy)

    @property
    def pieces(self) -> tuple[str | Field, ...]:
        """The message in order."""
        space = "" if str(next(iter(self.expected), ":")).startswith((":", ",")) else " "
        end = ("; ", *self.remedy) if self.remedy else ()
        return Field(self.field, self.found), space, *self.expected, *end

    def rename(self, names: Names) -> None:
        """Rename the fields in the message; a new value becomes what was found."""
        new = names.get(self.field)
        if isinstance(new, Field) and new.value is not ...:
            self.found = new.value
        self.field = Field(self.field).renamed(names).name
        self.expected, self.remedy = _renamed(self.expected, names), _renamed(self.remedy, names)
        self.args = (self.field, self.found, self.expected, self.remedy)


class SettingError(_FieldError, ConfigError):
    """A parameter has a wrong value, or parameters contradict each other."""


class SourceError(_FieldError, DataError):
    """What a parameter names (a model, a folder, data) does not meet the needs."""


def _pieces_of(text: Text) -> tuple[str | Field, ...]:
    if isinstance(text, Field):
        return (text,)
    return tuple(filter(None, (text,) if isinstance(text, str) else text))


def _renamed(pieces: Iterable[str | Field], names: Names) -> tuple[str | Field, ...]:
    return tuple(piece.renamed(names) if isinstance(piece, Field) else piece for piece in pieces)


@contextmanager
def named(**names: str | Field) -> Iterator[None]:
    """Rename parameters in the errors of a block to what the caller of this function calls them.

    Args:
        names: for each parameter of the functions in the block, its name here; a `Field` with a
            value replaces the value as well.
    """
    try:
        yield
    except (ConfigError, DataError) as error:
        error.rename(names)
        raise


def plain_type(error: ConfigError | DataError) -> type[ConfigError] | type[DataError]:
    """Return which of the two an error is, to raise another message of its kind."""
    return ConfigError if isinstance(error, ConfigError) else DataError


def joined(errors: Sequence[ConfigError | DataError]) -> ConfigError | DataError:
    """Return one error with the distinct messages of all, one per line; its type is the first's."""
    distinct = {str(error): error for error in errors}
    pieces = [piece for error in distinct.values() for piece in ("\n", *error.pieces)]
    return plain_type(errors[0])(*pieces[1:])


class DivergedError(RuntimeError):
    """The loss or the gradients stayed non-finite past the stated limit."""

    exit_code = EXIT_DIVERGED


class Problems:
    """Collects the problems of several checks, to report them all at once."""

    def __init__(self) -> None:
        self.found: list[ConfigError | DataError] = []

    def attempt(self, check: Callable[..., Result], *arguments: Any) -> Result | None:
        """Return the result of a check; None, and the problem is kept, if it fails."""
        try:
            return check(*arguments)
        except (ConfigError, DataError) as error:
            self.found.append(error)
            return None

    def raise_all(self) -> None:
        """Raise one error that lists all problems; do nothing if there are none.

        Its type is that of the first problem; each distinct message takes one line.
        """
        if self.found:
            raise joined(self.found) from self.found[0]


class PeerError(RuntimeError):
    """A failure that rank 0 reports for all: this rank exits silently with the same exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def say(prog: str, message: str) -> None:
    """Write a message to stderr, each line with the name of the command."""
    with suppress(OSError):  # a terminal that was closed
        sys.stderr.write("".join(f"{prog}: {line}\n" for line in message.splitlines()))
        sys.stderr.flush()


@contextmanager
def stopped_like_ctrl_c() -> Iterator[None]:
    """Let a scheduler's SIGTERM, and a terminal that is closed, clean up like Ctrl-C.

    Signals that are ignored, as under nohup, or handled already stay so.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if in_main_thread and signal.getsignal(number) is signal.SIG_DFL
    ]
    for number in numbers:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def carry_out(
    work: Callable[[], int | None],
    prog: str,
    *,
    names: Mapping[str, str] | None = None,
    disk: str | Path = "",
    interrupted: str = "",
) -> int:
    """Do the work of a subcommand and return its exit code; its errors become messages.

    Args:
        work: returns an exit code, or None for done.
        names: the options, by the parameters that errors name.
        disk: what to check if a file cannot be read or written.
        interrupted: what Ctrl-C, SIGTERM or SIGHUP leaves, for the message.
    """
    try:
        with stopped_like_ctrl_c(), named(**(names or {})):
            return work() or EXIT_DONE
    except (ConfigError, DataError) as error:
        say(prog, str(error))
        return error.exit_code
    except OSError as error:
        say(prog, f"{error}{f'; check {disk} and its disk' if disk else ''}")
        return EXIT_ENVIRONMENT
    except KeyboardInterrupt:
        say(prog, f"interrupted{f'; {interrupted}' if interrupted else ''}")
        return EXIT_INTERRUPTED
