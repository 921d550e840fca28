"""HTTP/1.1 responses as bytes come in (RFC 9112), without I/O. For relaying: body bytes are cut, never decoded.

Only what a client of well-behaved servers needs; everything else is an error and the connection is given up.
"""

from dataclasses import dataclass

MAX_HEAD_BYTES = 64 * 1024
MAX_CHUNK_LINE_BYTES = 4096
MAX_NOTED_CHUNK_BYTES = 64 * 2**20
"""A chunk with an extension waits in memory until it is whole."""
_HEX = b"0123456789abcdefABCDEF"

Headers = tuple[tuple[bytes, bytes], ...]
"""Names in lower case, in the order they came."""


class ProtocolError(Exception):
    """The peer does not speak HTTP/1.1 as we understand it."""


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """Status line and headers."""

    status: int
    headers: Headers
    keep_alive: bool
    length: int | None
    """Content-Length, None when the end of the body is marked otherwise."""
    chunked: bool

    def get(self, name: bytes) -> bytes | None:
        """The first header of this (lower-case) name."""
        for key, value in self.headers:
            if key == name:
                return value
        return None


def parse_header_lines(lines: list[bytes]) -> Headers:
    """`Name: value` lines, whitespace around values removed. Raises ProtocolError on folded or nameless lines."""
    headers = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not name or name[0] in b" \t" or name[-1] in b" \t":
            raise ProtocolError(f"not a header line: {line[:80]!r}")
        headers.append((name.lower(), value.strip(b" \t")))
    return tuple(headers)


def parse_response_head(data: bytes) -> ResponseHead:
    """Everything before the empty line."""
    status_line, *lines = data.split(b"\r\n")
    version, _, rest = status_line.partition(b" ")
    code = rest[:3]
    if version not in (b"HTTP/1.1", b"HTTP/1.0") or not (len(code) == 3 and code.isdigit()):
        raise ProtocolError(f"not a status line: {status_line[:80]!r}")
    status = int(code)
    headers = parse_header_lines(lines)
    keep_alive = version == b"HTTP/1.1"
    length: int | None = None
    chunked = False
    for name, value in headers:
        if name == b"content-length":
            if not value.isdigit() or (length is not None and length != int(value)):
                raise ProtocolError(f"content-length {value[:40]!r}")
            length = int(value)
        elif name == b"transfer-encoding":
            if value.lower() != b"chunked":
                raise ProtocolError(f"transfer-encoding {value[:40]!r}")
            chunked = True
        elif name == b"connection":
            options = {option.strip() for option in value.lower().split(b",")}
            keep_alive = b"close" not in options and (keep_alive or b"keep-alive" in options)
    if chunked:
        length = None
    elif status in (204, 304):
        length = 0
    return ResponseHead(status, headers, keep_alive, length, chunked)


def whole_chunks(data: bytes) -> tuple[bytes, bytes] | None:
    """The body bytes and the extensions of `data`, if it is nothing but chunks, all of them whole.

    None: that takes a `ResponseParser`. So does what is rare: sizes not in plain hex, and CRLF in the body.
    """
    lines = data.split(b"\r\n")
    if lines.pop() or len(lines) % 2:
        return None
    pieces, extensions = lines[1::2], b""
    for line, piece in zip(lines[::2], pieces, strict=True):
        size, semicolon, extension = line.partition(b";")
        if not piece or size != b"%x" % len(piece):
            return None
        if extension:
            extensions += semicolon + extension
    return b"".join(pieces), extensions


class ResponseParser:
    """One response after another on one connection.

    `feed` returns the pieces of body it found; `head` is set once known, `done` once the response is complete.
    `begin` starts the next one. Chunks with an extension are returned whole, and `notes` holds their extensions.
    """

    __slots__ = ("_after_data", "_buffer", "_in_trailers", "_left", "done", "head", "notes")

    def __init__(self) -> None:
        self._buffer = b""
        self.begin()

    def begin(self) -> None:
        """Expect a new response. Bytes beyond the end of the last one are kept and mean trouble: see `leftover`."""
        self.head: ResponseHead | None = None
        self.done = False
        self.notes = bytearray()
        """The extensions (`;name=value`) of all chunks returned so far, one after the other."""
        self._left = 0
        self._after_data = False
        self._in_trailers = False

    @property
    def leftover(self) -> bool:
        """Whether bytes came that belong to no response."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes, return body pieces. Raises ProtocolError; the connection is then useless."""
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        while self.head is None:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > MAX_HEAD_BYTES:
                    raise ProtocolError(f"a response head of more than {MAX_HEAD_BYTES} bytes")
                self._buffer = data
                return []
            head = parse_response_head(data[:end])
            data = data[end + 4 :]
            if head.status >= 200:
                self.head = head
                self._left = head.length or 0
                self.done = head.length == 0
            elif head.status == 101:
                raise ProtocolError("an upgrade nobody asked for")
        if self.head.chunked:
            return self._feed_chunked(data)
        if self.head.length is None:
            return [data] if data else []
        return self._feed_length(data)

    @property
    def at_chunk(self) -> bool:
        """In a chunked body, where a chunk is to begin and nothing of it is here."""
        if self.head is None or not self.head.chunked or self.done:
            return False
        return not (self._buffer or self._left or self._after_data or self._in_trailers)

    def end_of_input(self) -> bool:
        """The peer closed. Whether that completes the response (it does when only the close marks its end)."""
        if self.head is not None and self.head.length is None and not self.head.chunked:
            self.done = True
        return self.done

    def _feed_length(self, data: bytes) -> list[bytes]:
        if len(data) > self._left:
            data, self._buffer = data[: self._left], data[self._left :]
        self._left -= len(data)
        self.done = self._left == 0
        return [data] if data else []

    def _feed_chunked(self, data: bytes) -> list[bytes]:
        pieces: list[bytes] = []
        at, size = 0, len(data)
        while not self.done:
            if self._left:
                piece = data[at : at + self._left]
                if piece:
                    pieces.append(piece)
                    at += len(piece)
                    self._left -= len(piece)
                if self._left:
                    return pieces
                self._after_data = True
            if self._after_data:
                if size - at < 2:
                    break
                if data[at : at + 2] != b"\r\n":
                    raise ProtocolError(f"a chunk ends with {data[at : at + 2]!r}")
                at += 2
                self._after_data = False
            eol = data.find(b"\r\n", at)
            if eol < 0:
                if size - at > MAX_CHUNK_LINE_BYTES:
                    raise ProtocolError("a chunk size line without end")
                break
            line = data[at:eol]
            begin, at = at, eol + 2
            if self._in_trailers:
                self.done = not line
                continue
            digits, _, extension = line.partition(b";")
            digits = digits.rstrip(b" \t")
            # int() alone would take signs, underscores, spaces and 0x.
            self._left = int(digits, 16) if digits and not digits.strip(_HEX) else -1
            if self._left < 0:
                raise ProtocolError(f"chunk size {line[:40]!r}")
            if extension:
                if self._left > MAX_NOTED_CHUNK_BYTES:
                    raise ProtocolError(f"a chunk of {self._left} bytes with an extension")
                if size - at < self._left + 2:
                    self._left, at = 0, begin
                    break
                self.notes += b";" + extension
            self._in_trailers = self._left == 0
        self._buffer = data[at:]
        return pieces
