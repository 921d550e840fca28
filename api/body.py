"""Request bodies: JSON bytes to typed requests, with errors that name the field and never repeat the input.

Numbers may be written as strings ("0.5"), booleans are never numbers, NaN and infinities are refused, unknown fields
are ignored.
"""

import json
import math
import re
from typing import Any, TypeVar

import msgspec

from runtime.errors import RequestError

T = TypeVar("T", bound=msgspec.Struct)

_decoders: dict[type[Any], msgspec.json.Decoder[Any]] = {}

_JSON_TYPE = re.compile(r"application/(?:[\w.+-]+\+)?json", re.IGNORECASE)
_PLACE = re.compile(r" - at `(?:key` in `)?\$(?P<path>[^`]*)`$")
_MISSING = re.compile(r"^Object missing required field `(?P<field>[^`]*)`$")
_EXPECTED = re.compile(r"^Expected `(?P<expected>[^`]*)`, got `(?P<got>[^`]*)`$")
_KINDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "a boolean",
    "array": "an array",
    "object": "an object",
    "null": "null",
}
# Above this a body that is not JSON is not searched for the field that is at fault.
_MAX_EXPLAINED_BYTES = 2**20


def check_media_type(content_type: str | None) -> None:
    """Raises RequestError (415) for a body that says it is no JSON. Without the header the body itself decides."""
    if content_type is not None and not _JSON_TYPE.fullmatch(content_type.partition(";")[0].strip()):
        raise RequestError(
            "The request body must be JSON: set the header Content-Type to application/json.", status=415
        )


def decode(body: bytes, kind: type[T]) -> T:
    """`body` as a `kind`. Raises RequestError with the field in dotted form (`messages.0.content`)."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind, strict=False)
    if not body.strip():
        raise RequestError("The request body is empty; a JSON object is expected.")
    try:
        request: T = decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None
    except msgspec.DecodeError as error:
        raise syntax_error(body, error) from None
    except UnicodeDecodeError as error:
        raise RequestError(f"The request body is not valid UTF-8 (byte {error.start}).") from None
    except RecursionError:
        raise RequestError("The request body is nested too deeply.") from None
    _refuse_non_finite(request)
    return request


def _explain(message: str) -> RequestError:
    place = _PLACE.search(message)
    path = dotted(place["path"]) if place else ""
    reason = message[: place.start()] if place else message
    if missing := _MISSING.match(reason):
        path = f"{path}.{missing['field']}".lstrip(".")
        reason = "this field is required"
    elif expected := _EXPECTED.match(reason):
        wanted = " or ".join(_KINDS.get(kind, kind) for kind in expected["expected"].split(" | "))
        reason = f"expected {wanted}, got {_KINDS.get(expected['got'], expected['got'])}"
    elif reason.startswith(("Invalid enum value", "Invalid value")):
        reason = "this value is not one of those allowed here"
    if not path:
        return RequestError(f"The request body is invalid: {reason}.")
    return RequestError(f"{path}: {reason}", param=path)


def dotted(path: str) -> str:
    """msgspec's `.messages[0].content` as `messages.0.content`. A key of a map reads `...` there and is left out."""
    return path.replace("[...]", "").replace("[", ".").replace("]", "").lstrip(".")


def syntax_error(body: bytes, error: Exception) -> RequestError:
    """What to tell the sender of a body that a JSON parser refused with `error`, naming the field where that helps."""
    plain = RequestError(f"The request body is not valid JSON: {error}.")
    if len(body) > _MAX_EXPLAINED_BYTES:
        return plain
    try:
        # Python's parser takes the NaN and Infinity that JSON does not have, and integers of any size.
        path = _non_finite_path(json.loads(body, parse_int=float))
    except (ValueError, RecursionError):
        return plain
    if path is None:
        return plain
    return RequestError(f"{path}: NaN and infinite numbers are not allowed", param=path)


def _non_finite_path(value: Any) -> str | None:
    if isinstance(value, float):
        return None if math.isfinite(value) else ""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        path = _non_finite_path(item)
        if path is not None:
            return f"{str(key)[:100]}.{path}".rstrip(".")
    return None


def _refuse_non_finite(request: msgspec.Struct) -> None:
    """Numbers given as strings may still spell nan or inf."""
    for field in request.__struct_fields__:
        value = getattr(request, field)
        if isinstance(value, float) and not math.isfinite(value):
            raise RequestError(f"{field}: NaN and infinite numbers are not allowed", param=field)
