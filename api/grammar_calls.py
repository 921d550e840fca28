"""Tools -> the grammar of their calls in DSML.

A control token ends whatever text it follows, so a string value may hold anything, `</` included: the terminal of such
a value ends in `</`, and only there the closing tag's control token fits. Parameters come in the order of the schema.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from api.chat import Tool
from api.grammar_formats import lark_json, literal

_KEY: Final = re.compile(r'[^"\n]+')
_MAX_REFERENCES: Final = 8

# The terminals take what follows them of the tag as well: the end of a terminal is where a control token may come.
_SHARED: Final = r"""
extra: "<" dsml "parameter name=\"" ANY_KEY any_value
any_value: string_value | " string=\"false\">" any_json end_parameter
string_value: " string=\"true\">" STRING_VALUE dsml "parameter>\n"
end_parameter: "</" dsml "parameter>\n"
ANY_KEY: /[^"\n]{1,256}"/
STRING_VALUE: /(?s:.*)<\//
"""


class Values(msgspec.Struct, frozen=True):
    """What a parameter may hold: any string, one of some strings, JSON that is no string."""

    any_string: bool = False
    strings: tuple[str, ...] = ()
    other: bool = False

    def __or__(self, more: "Values") -> "Values":
        return Values(self.any_string or more.any_string, self.strings + more.strings, self.other or more.other)


ANYTHING: Final = Values(any_string=True, other=True)


def calls_grammar(tools: Sequence[Tool], dsml_id: int, *, opened: bool, single: bool, by_schema: Sequence[bool]) -> str:
    """Lark rules whose `calls` is a block of calls to `tools`: all of the block, or (`opened`) what follows its opener.

    `single` allows one call only. `by_schema` says for each tool whether its schema binds; without it the parameters
    are free.
    """
    opener = "" if opened else r'"\n\n<" dsml "tool_calls>\n" '
    rules = [
        f'calls: {opener}{"call" if single else "call+"} "</" dsml "tool_calls>"',
        "call: " + " | ".join(f"call_{number}" for number in range(len(tools))),
        f"dsml: <[{dsml_id}]>",
        f"any_json: {lark_json({})}",
    ]
    for number, (tool, binds) in enumerate(zip(tools, by_schema, strict=True)):
        rules += _tool_rules(tool, number, binds)
    return "\n".join(rules) + _SHARED


def _tool_rules(tool: Tool, number: int, binds: bool) -> list[str]:
    parameters = tool.parameters
    properties = parameters.get("properties", {})
    has_schema = binds and parameters.get("type") == "object" and isinstance(properties, Mapping)
    required: list[str] = []
    uses: list[str] = []
    rules: list[str] = []
    if has_schema:
        listed = parameters.get("required")
        needed = set(listed) if isinstance(listed, list | tuple) else set()
        for place, (key, schema) in enumerate(properties.items()):
            if not _KEY.fullmatch(key):
                continue  # such a key cannot be written in a tag
            name, tag = f"p_{number}_{place}", literal(f'parameter name="{key}"')
            uses.append(name if key in needed else f"{name}?")
            required += [name] * (key in needed)
            rules.append(f'{name}: "<" dsml {tag} {name}_value')
            rules += _value_rules(f"{name}_value", schema, _definitions(parameters))
    if not has_schema or _allows_more(parameters):
        uses.append("extra*")
    # A call without parameters has a blank line in their place.
    body = " ".join(uses) if required else " | ".join([r'"\n"?', *([" ".join(uses)] if uses else [])])
    head = literal(f'invoke name="{tool.name}">\n')
    return [f'call_{number}: "<" dsml {head} ({body}) "</" dsml "invoke>\\n"', *rules]


def _value_rules(name: str, schema: object, definitions: Mapping[str, Any]) -> list[str]:
    values = values_of(schema, definitions)
    ways: list[str] = []
    if values.any_string:
        ways.append("string_value")
    elif values.strings:
        choices = " | ".join(map(literal, dict.fromkeys(values.strings)))
        ways.append(rf'" string=\"true\">" ({choices}) end_parameter')
    if not values.other:
        return [f"{name}: {' | '.join(ways)}"]
    ways.append(rf'" string=\"false\">" {name}_json end_parameter')
    whole = {**schema, **definitions} if isinstance(schema, Mapping) else {}
    return [f"{name}: {' | '.join(ways)}", f"{name}_json: {lark_json(whole)}"]


def values_of(schema: object, definitions: Mapping[str, Any], depth: int = 0) -> Values:
    """Which kinds of values a schema allows. Unclear schemas allow anything."""
    if not isinstance(schema, Mapping) or depth > _MAX_REFERENCES:
        return ANYTHING
    if "$ref" in schema:
        return values_of(_resolve(schema["$ref"], definitions), definitions, depth + 1)
    for key in ("const", "enum"):
        if key in schema:
            listed = [schema[key]] if key == "const" else schema[key]
            if not isinstance(listed, list | tuple):
                return ANYTHING
            strings = tuple(value for value in listed if isinstance(value, str))
            return Values(strings=strings, other=len(strings) < len(listed))
    if "type" in schema:
        kinds = schema["type"] if isinstance(schema["type"], list | tuple) else [schema["type"]]
        return Values(any_string="string" in kinds, other=any(kind != "string" for kind in kinds))
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list | tuple) and schema[key]:
            united = Values()
            for option in schema[key]:
                united |= values_of(option, definitions, depth + 1)
            return united
    return ANYTHING


def _definitions(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {key: schema[key] for key in ("$defs", "definitions") if isinstance(schema.get(key), Mapping)}


def _resolve(reference: object, definitions: Mapping[str, Any]) -> object:
    """What a local reference such as `#/$defs/Name` points to, None where it leads nowhere."""
    if not isinstance(reference, str):
        return None
    found: object = definitions
    for step in reference.removeprefix("#/").split("/"):
        found = found.get(step) if isinstance(found, Mapping) else None
    return found


def _allows_more(parameters: Mapping[str, Any]) -> bool:
    """Whether undeclared parameters are welcome, not just tolerated."""
    more = parameters.get("additionalProperties")
    return more is True or isinstance(more, Mapping)
