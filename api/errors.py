"""Errors to the wire, in one place: HTTP status, and a body in OpenAI's or Anthropic's shape."""

import math
from typing import Any, Literal

from aiohttp import web

from runtime.errors import Overloaded, RequestError, TransferError

Dialect = Literal["openai", "anthropic"]

MAX_MESSAGE_CHARS = 500

_OPENAI_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Problem:
    """An exception as the caller will see it."""

    def __init__(self, error: BaseException) -> None:
        self.status = 500
        self.message = "The server failed to answer this request; its log has the details under the request id."
        self.param: str | None = None
        self.code: str | None = None
        self.headers: dict[str, str] = {}
        if isinstance(error, RequestError):
            self.status, self.message, self.code = error.status, str(error), error.code
            if error.param is not None:
                self.param = error.param.partition(".")[0]
                if not self.message.startswith(error.param):
                    self.message = f"{error.param}: {self.message}"
        elif isinstance(error, TransferError):
            self.message = "The prompt's state did not arrive from the prefill node; the log says why, by request id."
            self.code = "transfer_failed"
        elif isinstance(error, Overloaded):
            self.status, self.message = 503, str(error)
            self.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
        elif isinstance(error, web.HTTPRequestEntityTooLarge):
            self.status, self.message = 413, "The request body is too large."
        elif isinstance(error, web.HTTPException):
            self.status, self.message = error.status, error.reason
            if "Allow" in error.headers:
                self.headers["Allow"] = error.headers["Allow"]
        if len(self.message) > MAX_MESSAGE_CHARS:
            self.message = self.message[: MAX_MESSAGE_CHARS - 1] + "…"

    @property
    def is_server_fault(self) -> bool:
        return self.status == 500

    def body(self, dialect: Dialect = "openai") -> dict[str, Any]:
        """The JSON body, or the payload of an error event in a stream."""
        if dialect == "anthropic":
            default = "invalid_request_error" if self.status < 500 else "api_error"
            error: dict[str, Any] = {"type": _ANTHROPIC_TYPES.get(self.status, default), "message": self.message}
            if self.code is not None:
                error["details"] = {"error_code": self.code}
            return {"type": "error", "error": error}
        default = "BadRequestError" if self.status < 500 else "InternalServerError"
        kind = _OPENAI_TYPES.get(self.status, default)
        code = self.code if self.code is not None else self.status
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": code}}


def dialect_of(path: str) -> Dialect:
    """Which shape the errors of an endpoint take."""
    return "anthropic" if path.startswith("/v1/messages") else "openai"
