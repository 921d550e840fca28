"""The errors of Tandem.

    TandemError
    ├── ConfigError            a configuration, checkpoint config or command line that cannot be used
    ├── CheckpointError        a checkpoint directory that does not hold what its config says
    ├── RequestError           the caller's request is wrong; carries the field (HTTP 400/404/413)
    ├── Overloaded             the bound of a queue is reached; carries when to try again (HTTP 503)
    ├── TransferError          a request's state did not arrive; another attempt may succeed
    ├── EngineError            the engine cannot serve this request; a bug or a lost device
    └── ProcessDied            a child process ended, or was not ready in time

`ValueError` is for what a user gave to a function, `assert` for what only a bug of ours can break.
"""


class TandemError(Exception):
    """Base of every error that Tandem raises on purpose."""


class ConfigError(TandemError):
    """A configuration that cannot be used. The message names the field and the value."""


class CheckpointError(TandemError):
    """A checkpoint that does not hold what its config says. The message names the tensor or file."""


class RequestError(TandemError):
    """The caller's mistake.

    `param` is the offending field in dotted form (`messages.0.content`), or None when the body as a whole is wrong;
    `status` is the HTTP status; `code` a machine-readable reason such as `context_length_exceeded`.
    """

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


class Overloaded(TandemError):
    """A queue is at its bound. The caller may try again after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TransferError(TandemError):
    """A request's state did not arrive. The message names the transfer and what was waited for."""


class EngineError(TandemError):
    """The engine cannot serve this request through no fault of the caller."""


class ProcessDied(TandemError):
    """A child process ended, or was not ready before its deadline."""
