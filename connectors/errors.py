"""Every error that Bidbeam raises, split by what the caller does next.

    BidbeamError
    ├── UsageError            fix the call, the job, the pools or the input; nothing was spent (exit 2)
    │   ├── ConfigError       a key of a job or pools file: names file, line, key, what was expected
    │   ├── InputError        prompts that are missing, unreadable or of the wrong shape
    │   ├── ModelError        a model, tokenizer or chat template that does not load
    │   └── RunHeld           another start holds this run
    ├── StoreError            a store that fails or cannot keep a promise
    │   └── AlreadyExists     a create-only write met other content under its name
    ├── PoolDown              a pool that serves nothing any more: its lots go to their runners-up
    └── Interrupted           stopped by a signal; the same command resumes (exit 4)

All of them pickle, because Beam carries them between workers. No message ever holds a secret, a prompt or an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class BidbeamError(Exception):
    """The root of the tree. ``exit_code`` is what the command line ends with."""

    exit_code = 1


class UsageError(BidbeamError):
    """What was asked cannot be done as it stands; nothing was spent."""

    exit_code = 2


class ConfigError(UsageError):
    """A wrong key or value in a job or pools file.

    ``line`` is 1-based; ``key`` is the dotted path; ``expected`` says what would be right; ``nearest`` is the closest
    valid name, where the fault is a misspelt one.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | None = None,
        line: int | None = None,
        key: str | None = None,
        expected: str | None = None,
        nearest: str | None = None,
    ) -> None:
        self.problem, self.file, self.line = problem, file, line
        self.key, self.expected, self.nearest = key, expected, nearest
        super().__init__(str(self))

    def __str__(self) -> str:
        text = _located(self.problem, self.key, self.file, self.line)
        if self.expected:
            text += f" (expected {self.expected})"
        if self.nearest:
            text += f"; did you mean {self.nearest!r}?"
        return text

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_config_error, (self.problem, self.file, self.line, self.key, self.expected, self.nearest)


def _rebuild_config_error(
    problem: str, file: str | None, line: int | None, key: str | None, expected: str | None, nearest: str | None
) -> ConfigError:
    return ConfigError(problem, file=file, line=line, key=key, expected=expected, nearest=nearest)


class InputError(UsageError):
    """Prompts that are missing, unreadable, truncated or lack a column.

    ``key`` is the dotted path of the job's key that asked for what is not there, ``file`` and ``line`` (1-based) where
    it stands; None: no key did, or nobody has looked yet.
    """

    def __init__(
        self, problem: str, *, key: str | None = None, file: str | None = None, line: int | None = None
    ) -> None:
        self.problem, self.key, self.file, self.line = problem, key, file, line
        super().__init__(_located(problem, key, file, line))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_input_error, (self.problem, self.key, self.file, self.line)


def _rebuild_input_error(problem: str, key: str | None, file: str | None, line: int | None) -> InputError:
    return InputError(problem, key=key, file=file, line=line)


def _located(problem: str, key: str | None, file: str | None, line: int | None) -> str:
    where = ":".join(str(part) for part in (file, line) if part is not None)
    return (f"{where}: " if where else "") + (f"{key}: {problem}" if key else problem)


class ModelError(UsageError):
    """A model, tokenizer or chat template that does not load."""


class RunHeld(UsageError):  # noqa: N818 # named for what happened
    """Another start of the same run is alive and holds it."""


class StoreError(BidbeamError):
    """A store that fails, or that cannot keep a promise Bidbeam relies on."""


class AlreadyExists(StoreError):  # noqa: N818 # named for what happened
    """A create-only write met other content under its name."""


class PoolDown(BidbeamError):  # noqa: N818 # named for what happened
    """A pool that serves nothing any more; what it had goes to the runners-up."""


class Interrupted(BidbeamError):  # noqa: N818 # named for what happened
    """Stopped by a signal; the same command resumes."""

    exit_code = 4


_CONFIG_FIELDS = ("problem", "file", "line", "key", "expected", "nearest")


def error_to_json(error: BidbeamError) -> dict[str, Any]:
    """An error as JSON, by the nearest of the classes above; ``error_from_json`` makes it one again."""
    kind = next(each.__name__ for each in type(error).__mro__ if each in _KINDS.values())
    if isinstance(error, ConfigError):
        return {"type": kind, **{name: getattr(error, name) for name in _CONFIG_FIELDS}}
    return {"type": kind, "message": str(error)}


def error_from_json(data: Mapping[str, Any]) -> BidbeamError:
    """The error that ``error_to_json`` told of. Raises KeyError or TypeError for what is none."""
    kind = _KINDS[data["type"]]
    if kind is ConfigError:
        problem, *rest = (data[name] for name in _CONFIG_FIELDS)
        return ConfigError(str(problem), **dict(zip(_CONFIG_FIELDS[1:], rest, strict=True)))
    return kind(str(data["message"]))


_KINDS: Mapping[str, type[BidbeamError]] = {
    each.__name__: each
    for each in (
        BidbeamError, UsageError, ConfigError, InputError, ModelError, RunHeld, StoreError, AlreadyExists, PoolDown,
        Interrupted,
    )
}  # fmt: skip
