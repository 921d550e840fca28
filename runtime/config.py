"""Configuration: one strict YAML file per process, read once, at the edge.

Every part owns a small frozen msgspec struct; the process's own struct nests them. Unknown keys fail with their path,
`--set key.path=value` overrides, `--check` validates and prints what would run.
"""

import argparse
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from runtime.errors import ConfigError

T = TypeVar("T")


class _StrictLoader(yaml.SafeLoader):
    """YAML where a key given twice is an error and not a silent choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: key `{key}` is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def load(path: Path | None, kind: type[T], overrides: Sequence[str] = ()) -> T:
    """Read `path` (None: an empty file) as a `kind`, with `key.path=value` overrides applied on top.

    Raises ConfigError naming the file, the key's path and what is wrong with it.
    """
    data: Any = {}
    if path is not None:
        try:
            text = path.read_text()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None
        data = _parse(text, str(path)) or {}
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: expected a mapping of keys, got {type(data).__name__}")
    for override in overrides:
        _apply(data, override)
    return convert(data, kind, where=str(path) if path else "command line")


def convert(data: Any, kind: type[T], *, where: str) -> T:
    """Builtin types -> `kind`, strictly. Raises ConfigError."""
    try:
        return msgspec.convert(data, kind, strict=True)
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _apply(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: expected key.path=value")
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {override}: `{parent}` is not a mapping")
    data[last] = _parse(text, f"--set {override}")


def dump(config: msgspec.Struct) -> str:
    """The resolved configuration as YAML, defaults included."""
    return yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False, allow_unicode=True)


def argument_parser(program: str, description: str) -> argparse.ArgumentParser:
    """The options every Tandem process takes."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file; see configs/ for examples")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key, e.g. --set engine.max_num_seqs=64 (repeatable)",
    )
    parser.add_argument("--check", action="store_true", help="validate, print the resolved configuration, and exit")
    return parser
