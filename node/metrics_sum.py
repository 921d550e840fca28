"""The metrics of several API processes of one node as one exposition, in Prometheus's text format."""

from collections.abc import Sequence

from api.metrics import COUNTERS, ENGINE_HISTOGRAMS, GAUGES, PREFIXES

_OF_THE_NODE = frozenset(
    prefix + name
    for prefix in PREFIXES
    for name in (*GAUGES, *(f"{counter}_total" for counter in COUNTERS), *ENGINE_HISTOGRAMS)
)
"""Families that every process reports for the whole node, from what the engine ranks told all of them."""


def sum_expositions(parts: Sequence[bytes]) -> bytes:
    """Add up what each process counted itself; of what all of them know alike, take the first one's word."""
    families: dict[str, list[str]] = {}
    samples: dict[str, dict[str, float]] = {}
    for position, part in enumerate(parts):
        name, comments = "", list[str]()
        for line in part.decode().splitlines():
            if line.startswith("# HELP "):
                name = line.split(" ", 3)[2]
                if name not in families:
                    families[name], samples[name] = [], {}
                comments = families[name]
            if line.startswith("#"):
                if line not in comments:
                    comments.append(line)
                continue
            series, _, value = line.rpartition(" ")
            seen = samples[name]
            if series not in seen:
                seen[series] = float(value)
            elif position and not _is_common(name):
                seen[series] += float(value)
    lines = [
        line
        for name, comments in families.items()
        for line in (*comments, *(f"{series} {value!r}" for series, value in samples[name].items()))
    ]
    return "".join(f"{line}\n" for line in lines).encode()


def _is_common(name: str) -> bool:
    """Also times of creation and descriptions: their sum would mean nothing."""
    return name in _OF_THE_NODE or name.endswith(("_created", "_info"))
