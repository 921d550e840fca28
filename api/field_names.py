"""Errors about a chat's fields, in the names that the caller of another API wrote."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from runtime.errors import RequestError


@contextmanager
def renamed_fields(names: Mapping[str, str], places: Sequence[str] = ()) -> Iterator[None]:
    """Inside, a RequestError that names a field of a chat comes out naming the field that the caller wrote.

    `names` maps dotted paths, or beginnings of them, the longest first. `places[k]` is where message k came from.
    """
    try:
        yield
    except RequestError as error:
        given = error.param or ""
        renamed = _renamed(given, names, places)
        if renamed == given:
            raise
        message = str(error)
        if message.startswith(given):
            message = renamed + message[len(given) :]
        raise RequestError(message, param=renamed, status=error.status, code=error.code) from None


def _renamed(path: str, names: Mapping[str, str], places: Sequence[str]) -> str:
    field, _, rest = path.partition(".")
    index, _, inner = rest.partition(".")
    if field == "messages" and index.isdigit() and int(index) < len(places):
        return f"{places[int(index)]}.{inner}".rstrip(".")
    if field == "tools":
        path = path.replace(".function.", ".", 1)
    for name, theirs in names.items():
        if path == name or path.startswith(f"{name}."):
            return theirs + path[len(name) :]
    return path
