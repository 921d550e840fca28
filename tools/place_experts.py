"""Place the experts so that the ranks share the work evenly, from counters of a running cluster.

    python -m tools.place_experts --ranks 4 --out placement.json URL_OR_FILE...

Each URL is a node with `expert_parallel.load_counters` on (its `GET /cluster/experts` is asked), each file what such a
node answered; counts are added up. Every rank gets the same number of experts in every layer, one more where they do
not divide. Layer by layer the busiest expert goes to the rank with the least work that still has room. The file is
what `expert_parallel.placement` reads. Prints by how much the busiest rank exceeds the mean, before and after.
"""

from __future__ import annotations

import argparse
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import msgspec

from model.placement import Placement

_TIMEOUT_S = 10.0


class ExpertCounts(msgspec.Struct, frozen=True):
    """Answer of `GET /cluster/experts`."""

    layers: list[list[int]]
    """Tokens that chose each expert, by layer."""


def place(counts: Sequence[int], ranks: int) -> list[int]:
    """Tokens per expert -> the rank of each expert."""
    rank_of = [0] * len(counts)
    work = [0] * ranks
    room = [len(counts) * (rank + 1) // ranks - len(counts) * rank // ranks for rank in range(ranks)]
    for expert in sorted(range(len(counts)), key=lambda expert: (-counts[expert], expert)):
        rank = min((rank for rank in range(ranks) if room[rank]), key=lambda rank: (work[rank], rank))
        rank_of[expert] = rank
        work[rank] += counts[expert]
        room[rank] -= 1
    return rank_of


def excess(counts: Sequence[int], rank_of: Sequence[int], ranks: int) -> float:
    """Work of the busiest rank as a multiple of the mean."""
    work = [0] * ranks
    for count, rank in zip(counts, rank_of, strict=True):
        work[rank] += count
    return max(work) * ranks / max(1, sum(work))


def read(source: str) -> ExpertCounts:
    """Raises ValueError and OSError."""
    if source.startswith(("http://", "https://")):
        with urllib.request.urlopen(f"{source.rstrip('/')}/cluster/experts", timeout=_TIMEOUT_S) as answer:
            body = answer.read()
    else:
        body = Path(source).read_bytes()
    return msgspec.json.decode(body, type=ExpertCounts)


def added(parts: Sequence[ExpertCounts]) -> list[list[int]]:
    shapes = {(len(part.layers), len(part.layers[0]) if part.layers else 0) for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"counts of different models: {sorted(shapes)} layers and experts")
    return [
        [sum(counts) for counts in zip(*rows, strict=True)] for rows in zip(*(p.layers for p in parts), strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.place_experts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", nargs="+", metavar="URL_OR_FILE")
    parser.add_argument("--ranks", type=int, required=True, help="ranks that share the experts")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        layers = added([read(source) for source in options.sources])
        if not layers:
            raise ValueError("no counts yet")
        if not 1 <= options.ranks <= len(layers[0]):
            raise ValueError(f"--ranks {options.ranks}: there are {len(layers[0])} experts")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    placed = {str(layer): place(counts, options.ranks) for layer, counts in enumerate(layers)}
    options.out.write_bytes(msgspec.json.encode({"ranks": options.ranks, "layers": placed}))
    even = Placement.even(len(layers[0]), options.ranks).ranks_of(0)
    print("busiest rank over the mean, by layer: equal runs -> placed")
    for layer, counts in enumerate(layers):
        before, after = excess(counts, even, options.ranks), excess(counts, placed[str(layer)], options.ranks)
        print(f"  {layer:3d}  {before:5.2f} -> {after:5.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
