"""What a caller may ask of an answer's form -> one grammar of llguidance, checked for size before it is compiled."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

from runtime.errors import RequestError

MAX_GRAMMAR_CHARS: Final = 128 * 1024
MAX_DEPTH: Final = 120
"""Levels of JSON, two for each object inside an object."""
MAX_PROPERTIES: Final = 500
"""Per object: the cost of optional properties grows with the square of their number."""
MAX_ERROR_CHARS: Final = 200
WHITESPACE: Final = r"[ \n\r\t]{0,64}"
"""Between JSON tokens. Bounded, because a model can get lost in endless blanks."""

Format = Mapping[str, Any]
"""One entry of llguidance's `grammars` list, without a name."""


def json_schema_format(schema: object, param: str) -> Format:
    """Answers that are JSON of this schema. Raises RequestError for a schema that is no schema, or too large."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise RequestError(f"{param}: the schema is not valid JSON", param=param) from None
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, Mapping):
        raise RequestError(f"{param}: the schema must be an object", param=param)
    check_schema_size(schema, param)
    return {"json_schema": with_options(schema)}


def json_object_format() -> Format:
    return {"json_schema": with_options({"type": "object"})}


def regex_format(pattern: str, param: str) -> Format:
    """Answers that match a regular expression from end to end, in the syntax of Rust's regex crate."""
    check_chars(pattern, param)
    return _only_grammar(LLMatcher.grammar_from_regex(pattern))


def choice_format(choices: Sequence[object], param: str) -> Format:
    """Answers that are one of these strings."""
    texts = [choice for choice in choices if isinstance(choice, str) and choice]
    if not texts or len(texts) < len(choices):
        raise RequestError(f"{param}: must be a list of non-empty strings", param=param)
    grammar = "start: " + " | ".join(map(literal, texts))
    check_chars(grammar, param)
    return {"lark_grammar": grammar}


def grammar_format(grammar: str, param: str) -> Format:
    """Answers of a context-free grammar, in Lark's notation or as GBNF/EBNF (`name ::= ...`)."""
    check_chars(grammar, param)
    if "::=" not in grammar:
        return {"lark_grammar": grammar}
    try:
        return {"lark_grammar": gbnf_to_lark(grammar)}
    except (GbnfToLarkError, ValueError, IndexError, RecursionError) as error:
        raise RequestError(f"{param}: not a grammar in GBNF: {first_line(str(error))}", param=param) from error


def first_line(error: str) -> str:
    """The library's message without its dump of the grammar and the parser's state."""
    line = next((line.strip() for line in error.splitlines() if line.strip()), "")
    return line if len(line) <= MAX_ERROR_CHARS else f"{line[: MAX_ERROR_CHARS - 1]}…"


def literal(text: str) -> str:
    """A string of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def lark_json(schema: Mapping[str, Any]) -> str:
    """A rule body of a Lark grammar that matches JSON of a schema."""
    return f"%json {json.dumps(with_options(schema), ensure_ascii=False)}"


def with_options(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema with our compile options in the place of any it brings along."""
    return {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}


def check_schema_size(schema: Mapping[str, Any], param: str) -> None:
    """Refuse what would be too deep, too wide or too long to compile. Raises RequestError."""
    level: list[object] = [schema]
    for _ in range(MAX_DEPTH):
        level = list(_children(level, param))
        if not level:
            break
    else:
        raise RequestError(f"{param}: the schema is nested deeper than {MAX_DEPTH} levels", param=param)
    check_chars(json.dumps(schema, ensure_ascii=False), param)


def _children(values: Iterable[object], param: str) -> Iterator[object]:
    for value in values:
        if isinstance(value, Mapping):
            if len(value) > MAX_PROPERTIES:
                message = f"{param}: the schema has an object with {len(value)} members, more than {MAX_PROPERTIES}"
                raise RequestError(message, param=param)
            yield from value.values()
        elif isinstance(value, list | tuple):
            yield from value


def check_chars(text: str, param: str) -> None:
    if len(text) > MAX_GRAMMAR_CHARS:
        raise RequestError(f"{param}: {len(text)} characters, more than {MAX_GRAMMAR_CHARS}", param=param)


def _only_grammar(grammar: str) -> Format:
    [entry] = json.loads(grammar)["grammars"]
    return {key: value for key, value in entry.items() if key != "name" and value is not None}
