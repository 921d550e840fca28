"""Tool calls in DSML -> names and JSON arguments, streamed.

    <｜DSML｜invoke name="NAME">
    <｜DSML｜parameter name="KEY" string="true|false">VALUE</｜DSML｜parameter>
    </｜DSML｜invoke>

Whatever is not part of a call is dropped, inside the block and after it; a later block adds calls. String values are
streamed as they come; others are held until their end, because only then it is known whether they are JSON.
"""

import enum
import json
import re
from collections.abc import Callable
from typing import Final

import orjson

from api.parse_marks import DSML, spell
from api.parse_prose import BLOCK_NAMES
from api.parse_sink import EventSink

MAX_TAG_CHARS: Final = 1024
"""A name or attribute list that is longer than this was never closed."""

_TAG: Final = re.compile(f"</?{DSML}")
_TAG_END: Final = re.compile(f">|</?{DSML}")


class Tag(enum.Enum):
    INVOKE = enum.auto()
    PARAMETER = enum.auto()
    PARAMETER_END = enum.auto()
    INVOKE_END = enum.auto()
    BLOCK_END = enum.auto()
    PARTIAL = enum.auto()
    """Still the beginning of more than one thing."""
    UNKNOWN = enum.auto()


_OPENING: Final = {'invoke name="': Tag.INVOKE, 'parameter name="': Tag.PARAMETER}
_CLOSING: Final = {
    "parameter>": Tag.PARAMETER_END,
    "invoke>": Tag.INVOKE_END,
    **{f"{name}>": Tag.BLOCK_END for name in BLOCK_NAMES},
}


class CallsParser:
    """Fed with the text after a block's opener. Each state is a method that returns whether it got further."""

    def __init__(self, sink: EventSink) -> None:
        self._sink = sink
        self._buffer = ""
        self._state: Callable[[], bool] = self._between_calls
        self._num_parameters = 0
        self._is_string = False
        self._value: list[str] = []
        """A non-string value, or a whole JSON body, so far."""

    def feed(self, text: str) -> None:
        self._buffer += text
        while self._state():
            pass

    def finish(self, *, complete: bool) -> None:
        """The output ended. `complete`: the model ended it, so an open call is closed into valid JSON; otherwise it
        was cut, and arguments stay as far as they came."""
        begun_tag = _TAG.match(self._buffer) is not None
        ends_call = complete or (self._state == self._in_call and self._buffer.startswith(f"</{DSML}"))
        if self._state == self._key:
            self._sink.arguments('": ""' if complete else "")
        elif self._state == self._after_key:
            self._sink.arguments(': ""' if complete else "")
        elif self._state == self._attributes:
            self._sink.arguments('""' if complete else "")
        elif self._state == self._in_value:
            if not begun_tag:
                self._take(self._buffer)
            if complete or begun_tag:
                self._end_value()
            else:
                self._sink.arguments(spell("".join(self._value)))
        elif self._state == self._json_body:
            body = "".join(self._value) + ("" if begun_tag else self._buffer)
            if not complete:
                self._sink.arguments(spell(body))
            elif self._end_json_body(body):
                return
        if self._state in (self._between_calls, self._name):
            return
        if ends_call:
            self._end_call()

    def _between_calls(self) -> bool:
        found = _TAG.search(self._buffer)
        if found is None:
            self._buffer = self._possible_tag()
            return False
        tag, end = self._tag_at(found)
        if tag is Tag.PARTIAL:
            self._buffer = self._buffer[found.start() :]
            return False
        self._buffer = self._buffer[end:]
        if tag is Tag.INVOKE:
            self._state = self._name
        return True

    def _name(self) -> bool:
        name, quote, rest = self._buffer.partition('"')
        if not quote:
            if len(name) > MAX_TAG_CHARS:
                self._state = self._between_calls
                return True
            return False
        self._sink.begin_call(name)
        self._num_parameters = 0
        self._value = []
        self._buffer = rest
        self._state = self._after_name
        return True

    def _after_name(self) -> bool:
        """The rest of the invoke tag, which may close itself."""
        found = _TAG_END.search(self._buffer)
        if found is None:
            self._buffer = self._buffer[-2:]
            return False
        closes_itself = found.group() == ">" and self._buffer[: found.start()].rstrip().endswith("/")
        self._buffer = self._buffer[found.end() if found.group() == ">" else found.start() :]
        if closes_itself:
            self._end_call()
        else:
            self._state = self._before_parameters
        return True

    def _before_parameters(self) -> bool:
        """Decides whether the call's body is one JSON object in the place of parameters."""
        self._buffer = self._buffer.lstrip()
        if not self._buffer:
            return False
        self._state = self._json_body if self._buffer.startswith("{") else self._in_call
        return True

    def _in_call(self) -> bool:
        found = _TAG.search(self._buffer)
        if found is None:
            self._buffer = self._possible_tag()
            return False
        tag, end = self._tag_at(found)
        if tag in (Tag.PARTIAL, Tag.INVOKE):
            self._buffer = self._buffer[found.start() :]
            if tag is Tag.INVOKE:
                self._end_call()
            return tag is Tag.INVOKE
        self._buffer = self._buffer[end:]
        if tag is Tag.PARAMETER:
            self._sink.arguments(', "' if self._num_parameters else '{"')
            self._num_parameters += 1
            self._state = self._key
        elif tag in (Tag.INVOKE_END, Tag.BLOCK_END):
            self._end_call()
        return True

    def _key(self) -> bool:
        key, quote, self._buffer = self._buffer.partition('"')
        self._sink.arguments(_escape(key) + quote)
        if quote:
            self._state = self._after_key
        return bool(quote)

    def _after_key(self) -> bool:
        if not self._buffer:
            return False
        self._sink.arguments(": ")
        self._state = self._attributes
        return True

    def _attributes(self) -> bool:
        found = _TAG_END.search(self._buffer)
        if found is None and len(self._buffer) <= MAX_TAG_CHARS:
            return False
        attributes = self._buffer[: found.start()] if found else ""
        if found and found.group() == ">" and not attributes.rstrip().endswith("/"):
            self._is_string = 'string="true"' in attributes
            self._buffer = self._buffer[found.end() :]
            self._sink.arguments('"' if self._is_string else "")
            self._state = self._in_value
        else:
            self._sink.arguments('""')
            self._buffer = self._buffer[found.end() if found and found.group() == ">" else len(attributes) :]
            self._state = self._in_call
        return True

    def _in_value(self) -> bool:
        found = _TAG.search(self._buffer)
        if found is None:
            held = self._possible_tag()
            self._take(self._buffer[: len(self._buffer) - len(held)])
            self._buffer = held
            return False
        tag, end = self._tag_at(found)
        if tag is Tag.UNKNOWN:
            self._take(self._buffer[:end])
            self._buffer = self._buffer[end:]
            return True
        self._take(self._buffer[: found.start()])
        self._buffer = self._buffer[found.start() :]
        if tag is Tag.PARTIAL:
            return False
        if tag is Tag.PARAMETER_END:
            self._buffer = self._buffer[end - found.start() :]
        self._end_value()
        return True

    def _json_body(self) -> bool:
        found = _TAG.search(self._buffer)
        tag, end = self._tag_at(found) if found else (None, 0)
        if found is None or tag is Tag.PARTIAL:
            held = self._possible_tag() if found is None else self._buffer[found.start() :]
            self._value.append(self._buffer[: len(self._buffer) - len(held)])
            self._buffer = held
            return False
        if tag in (Tag.UNKNOWN, Tag.PARAMETER_END):
            self._value.append(self._buffer[:end])
            self._buffer = self._buffer[end:]
            return True
        body = "".join(self._value) + self._buffer[: found.start()]
        self._buffer = self._buffer[found.start() :]
        if not self._end_json_body(body):
            self._state = self._in_call
        return True

    def _end_json_body(self, body: str) -> bool:
        """Accept the body as the arguments if it is a JSON object. That ends the call."""
        self._value = []
        text = spell(body).strip()
        if not isinstance(_parsed(text), dict):
            return False
        self._sink.arguments(text)
        self._sink.end_call()
        self._state = self._between_calls
        return True

    def _take(self, text: str) -> None:
        if self._is_string:
            self._sink.arguments(_escape(text))
        else:
            self._value.append(text)

    def _end_value(self) -> None:
        if self._is_string:
            self._sink.arguments('"')
        else:
            text = spell("".join(self._value))
            self._sink.arguments(_quote(text) if _parsed(text) is _NOT_JSON else text)
            self._value = []
        self._state = self._in_call

    def _end_call(self) -> None:
        self._sink.arguments("}" if self._num_parameters else "{}")
        self._sink.end_call()
        self._state = self._between_calls

    def _tag_at(self, found: "re.Match[str]") -> tuple[Tag, int]:
        """Which tag begins at `found`, and where it, or the part of it that is certain, ends."""
        begin = found.end()
        rest = self._buffer[begin : begin + MAX_LITERAL_CHARS]
        tags = _CLOSING if found.group().startswith("</") else _OPENING
        for literal, tag in tags.items():
            if rest.startswith(literal):
                return tag, begin + len(literal)
        if any(literal.startswith(rest) for literal in tags):
            return Tag.PARTIAL, begin
        return Tag.UNKNOWN, begin

    def _possible_tag(self) -> str:
        """A tail of the buffer that may become a tag."""
        return next((tail for tail in ("</", "<") if self._buffer.endswith(tail)), "")


MAX_LITERAL_CHARS: Final = max(map(len, (*_OPENING, *_CLOSING)))
_NOT_JSON: Final = object()


def _parsed(text: str) -> object:
    """The value of a JSON text, or _NOT_JSON. Strict: no NaN, no lone surrogates, bounded nesting."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return _NOT_JSON


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escape(text: str) -> str:
    """Text as it stands inside a JSON string."""
    return _quote(spell(text))[1:-1]
