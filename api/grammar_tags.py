"""Structural tags: free text in which certain tags, once begun, must hold what their schema says.

Both spellings in use are read: `{"structures": [{"begin", "schema", "end"}], "triggers": [...]}`, and `{"format": ...}`
with the types const_string, any_text, json_schema, regex, sequence, or, tag and triggered_tags.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from api.grammar_formats import Format, check_chars, check_schema_size, lark_json, literal
from runtime.errors import RequestError

MAX_LEVELS: Final = 16


def structural_tag_format(value: object, param: str) -> Format:
    """The grammar of a structural tag. Raises RequestError for one that is malformed or of an unknown type."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RequestError(f"{param}: is not valid JSON", param=param) from None
    if not isinstance(value, Mapping):
        raise RequestError(f"{param}: must be an object", param=param)
    rules = _Rules(param)
    if "format" in value:
        start = rules.format(value["format"], MAX_LEVELS)
    else:
        tags = [
            {
                "begin": tag.get("begin"),
                "content": {"type": "json_schema", "json_schema": tag.get("schema")},
                "end": tag.get("end"),
            }
            for tag in rules.objects(value.get("structures"), "structures")
        ]
        start = rules.triggered(tags, value.get("triggers"), MAX_LEVELS)
    grammar = "\n".join([f"start: {start}", *rules.lines])
    check_chars(grammar, param)
    return {"lark_grammar": grammar}


class _Rules:
    """Collects named rules; each method returns what the rule above it says in that place."""

    def __init__(self, param: str) -> None:
        self._param = param
        self.lines: list[str] = []

    def format(self, value: object, levels: int) -> str:
        if not isinstance(value, Mapping):
            raise self._error("a format must be an object")
        if not levels:
            raise self._error(f"nested deeper than {MAX_LEVELS} levels")
        kind = value.get("type")
        if kind == "const_string":
            return literal(self._text(value, "value"))
        if kind == "any_text":
            return self._rule("/(?s:.*)/")
        if kind == "json_schema":
            return self._json(value.get("json_schema"))
        if kind == "regex":
            return self._rule(f"/{_in_slashes(self._text(value, 'pattern'))}/")
        if kind in ("sequence", "or"):
            parts = [self.format(part, levels - 1) for part in self.objects(value.get("elements"), "elements")]
            return f"({(' ' if kind == 'sequence' else ' | ').join(parts)})"
        if kind == "tag":
            return f"({literal(self._text(value, 'begin'))} {self._rest_of_tag(value, levels)})"
        if kind == "triggered_tags":
            if value.get("at_least_one") or value.get("stop_after_first"):
                raise self._error("at_least_one and stop_after_first are not supported")
            return self.triggered(self.objects(value.get("tags"), "tags"), value.get("triggers"), levels)
        raise self._error("a format has an unknown type")

    def triggered(self, tags: Sequence[Mapping[str, Any]], triggers: object, levels: int) -> str:
        """Any text; where a trigger appears in it, one of the tags that begin so must follow."""
        if not isinstance(triggers, list | tuple) or not triggers:
            raise self._error("triggers must be a list of strings")
        ways: list[str] = []
        for trigger in triggers:
            if not isinstance(trigger, str) or not trigger:
                raise self._error("triggers must be a list of strings")
            begun = [tag for tag in tags if self._text(tag, "begin").startswith(trigger)]
            if not begun:
                raise self._error("a trigger begins none of the tags")
            text = self._rule(f"/(?s:.*){_in_slashes(re.escape(trigger))}/", lazy=True)
            rests = [
                f"{literal(tag['begin'][len(trigger) :])} {self._rest_of_tag(tag, levels)}"
                if len(tag["begin"]) > len(trigger)
                else self._rest_of_tag(tag, levels)
                for tag in begun
            ]
            ways.append(f"{text} ({' | '.join(rests)})")
        return f"({' | '.join(ways)})* {self._rule('/(?s:.*)/')}"

    def objects(self, value: object, name: str) -> list[Mapping[str, Any]]:
        if not isinstance(value, list | tuple) or not value or not all(isinstance(entry, Mapping) for entry in value):
            raise self._error(f"{name} must be a non-empty list of objects")
        return list(value)

    def _rest_of_tag(self, tag: Mapping[str, Any], levels: int) -> str:
        """The content and the end of a tag; text inside a tag reaches to the first end."""
        content, end = tag.get("content"), self._text(tag, "end", may_be_empty=True)
        if isinstance(content, Mapping) and content.get("type") == "any_text" and end:
            return self._rule(f"/(?s:.*){_in_slashes(re.escape(end))}/", lazy=True)
        return f"{self.format(content, levels - 1)} {literal(end) if end else ''}"

    def _json(self, schema: object) -> str:
        if isinstance(schema, bool):
            schema = {} if schema else {"not": {}}
        if not isinstance(schema, Mapping):
            raise self._error("a schema must be an object")
        check_schema_size(schema, self._param)
        return self._rule(lark_json(schema))

    def _rule(self, body: str, *, lazy: bool = False) -> str:
        name = f"r{len(self.lines)}"
        self.lines.append(f"{name}{'[lazy]' if lazy else ''}: {body}")
        return name

    def _text(self, value: Mapping[str, Any], key: str, *, may_be_empty: bool = False) -> str:
        text = value.get(key, "" if may_be_empty else None)
        if not isinstance(text, str) or not (text or may_be_empty):
            raise self._error(f"{key} must be a string")
        return text

    def _error(self, problem: str) -> RequestError:
        return RequestError(f"{self._param}: {problem}", param=self._param)


def _in_slashes(pattern: str) -> str:
    """A pattern as it stands between the slashes of a terminal, on one line."""
    return re.sub(r"(?<!\\)/", r"\/", pattern).replace("\n", r"\n")
