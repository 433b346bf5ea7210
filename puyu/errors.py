"""The exception tree. A user sees one line: what is wrong, where, and the remedy.

PuyuError                 anything a person can mend; the CLI prints it and exits with `exit_code`
├── ConfigError           recipe or flag: unknown key, wrong type, missing value     (exit 2)
├── InputError            a file or a record that cannot be used                     (exit 3)
├── CheckpointError       a model directory that is missing, torn or does not fit    (exit 4)
├── ResourceError         disk full, port in use, out of memory                      (exit 5)
├── DependencyError       an optional package or program that is not installed       (exit 6)
├── TrainingError         a run that is ill beyond repair; the last state is kept    (exit 7)
├── RetryError            lost, hung or full: the same command goes on later         (exit 75)
├── RequestError          a request that this model or server cannot accept          (HTTP 400)
└── ToolError             a tool failed; becomes an observation for the model

Programming errors stay assertions. Nothing in the package catches `Exception` and goes on in silence.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DependencyError",
    "InputError",
    "PuyuError",
    "RequestError",
    "ResourceError",
    "RetryError",
    "ToolError",
    "TrainingError",
]


class PuyuError(Exception):
    """Base of every error that a person can mend.

    `remedy` says what to do; `str(error)` joins both, so that no caller can drop it.
    """

    exit_code = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        self.message = message
        self.remedy = remedy
        super().__init__(message if not remedy else f"{message}\n  remedy: {remedy}")


class ConfigError(PuyuError):
    """A recipe, flag or override that cannot be used."""

    exit_code = 2


class InputError(PuyuError):
    """A file or record that cannot be used."""

    exit_code = 3


class CheckpointError(PuyuError):
    """A model directory that is missing, torn, or does not fit its use."""

    exit_code = 4


class ResourceError(PuyuError):
    """The machine lacks something: disk, memory, a free port."""

    exit_code = 5


class DependencyError(PuyuError):
    """An optional package or program is missing; the remedy is the install line."""

    exit_code = 6


class TrainingError(PuyuError):
    """Training cannot go on (loss not finite, or rising, after every remedy); the last good state is kept."""

    exit_code = 7


class RetryError(PuyuError):
    """The work itself is sound: a process was lost or hung, or the disk was full. The same command goes on."""

    exit_code = 75


class RequestError(PuyuError):
    """A request that cannot be accepted; `param` names the field, `code` the case (OpenAI error body)."""

    exit_code = 8

    def __init__(self, message: str, *, param: str | None = None, remedy: str = "", code: str | None = None) -> None:
        self.param, self.code = param, code
        super().__init__(message, remedy=remedy)


class ToolError(PuyuError):
    """A tool refused its arguments or failed; the text is shown to the model."""

    exit_code = 9
