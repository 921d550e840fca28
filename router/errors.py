"""What goes wrong while routing, and how a client reads it."""

import math

import orjson

from api.errors import Problem, dialect_of
from router.sink import Headers
from runtime.errors import TandemError


class RouteError(TandemError):
    """No answer could be had for this request. `status` is what the client gets."""

    def __init__(self, message: str, *, status: int, code: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s


def no_nodes(message: str) -> RouteError:
    return RouteError(message, status=503, code="no_nodes", retry_after_s=1.0)


def problem_of(error: Exception) -> Problem:
    """Any error as the client will see it."""
    problem = Problem(error)
    if isinstance(error, RouteError):
        problem.status, problem.message, problem.code = error.status, str(error), error.code
        if error.retry_after_s is not None:
            problem.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return problem


def error_answer(error: Exception, path: str) -> tuple[int, Headers, bytes]:
    """Status, headers and body in the shape that clients of this path read."""
    problem = problem_of(error)
    headers = [("Content-Type", "application/json"), *problem.headers.items()]
    return problem.status, headers, orjson.dumps(problem.body(dialect_of(path)))


def error_event(error: Exception, path: str) -> bytes:
    """The end of a stream that failed after it began."""
    problem = problem_of(error)
    payload = orjson.dumps(problem.body(dialect_of(path)))
    if path.startswith("/v1/messages"):
        return b"event: error\ndata: " + payload + b"\n\n"
    if path.startswith("/v1/responses"):
        event = {"type": "error", "code": problem.code, "message": problem.message, "param": problem.param}
        return b"event: error\ndata: " + orjson.dumps(event) + b"\n\n"
    return b"data: " + payload + b"\n\ndata: [DONE]\n\n"


def refusal_event(body: bytes, path: str) -> bytes:
    """A node's 4xx body as the end of a stream that is already open."""
    if path.startswith(("/v1/messages", "/v1/responses")):
        return b"event: error\ndata: " + body + b"\n\n"
    return b"data: " + body + b"\n\ndata: [DONE]\n\n"
