"""A request's logits and state at Flash's width, to the bit, in whatever company it is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_rank import PAGE_TOKENS, Rank, build_rank, first_layers
from engine.decode_graphs import CudaCapture
from engine.memory import PoolSizes
from model.batch import ForwardBatch
from model.presets import flash

pytestmark = pytest.mark.gpu

REQUESTS, LAYERS, LONGEST = 512, 4, 8400
"""Of the four layers two attend to a window, one to 512 chosen entries, one to all; experts are a quarter of 256."""
CHUNK = 300
"""The most tokens of a chunk."""
PAGES = -(-(LONGEST + CHUNK) // PAGE_TOKENS)
NARROW, WIDE = 48, 64
"""Pages of a table: what the longest request of a batch decides for all."""
EDGES = (0, 1, 2, 3, 4, 127, 128, 129, 2047, 2048, 2051, 8191, 8192, LONGEST - 1)
"""Context lengths at the ends of windows, blocks, pages, lists and of what one launch scores."""


class Requests:
    """REQUESTS requests with a state, pages of their own, and a next token."""

    def __init__(self, rank: Rank) -> None:
        generator = torch.Generator().manual_seed(5)
        self.rank = rank
        self.context = torch.randint(0, LONGEST - 1, (REQUESTS,), generator=generator, dtype=torch.int32)
        self.context[: len(EDGES)] = torch.tensor(EDGES)
        self.tokens = torch.randint(3, rank.config.vocab_size, (REQUESTS, CHUNK), generator=generator)
        self.pages = torch.randperm(REQUESTS * PAGES, generator=generator).view(REQUESTS, PAGES).int()
        self._kept = rank.memory.pages.clone(), rank.memory.slots.clone()
        self._capture = CudaCapture(rank.device)
        self._steps: dict[tuple[int, int], tuple[ForwardBatch, Callable[[], Tensor]]] = {}

    def batch(self, members: Sequence[int], counts: Sequence[int], size: int, width: int) -> ForwardBatch:
        """The next tokens of the members, padded to `size` requests, on the CPU; their last tokens give logits."""
        mine, padding = torch.tensor(members), size - len(members)
        count = torch.tensor([*counts, *[1] * padding], dtype=torch.int32)
        context = torch.cat((self.context[mine], torch.zeros(padding, dtype=torch.int32)))
        table = torch.zeros(size, width, dtype=torch.int32)
        table[: len(members), :PAGES] = self.pages[mine]
        query_start = torch.cat((torch.zeros(1, dtype=torch.int32), count.cumsum(0, dtype=torch.int32)))
        ids = [self.tokens[member, :number] for member, number in zip(members, counts, strict=True)]
        positions = [torch.arange(first, first + n) for first, n in zip(context.tolist(), count.tolist(), strict=True)]
        slots = torch.full((size,), REQUESTS, dtype=torch.int32)
        slots[: len(members)] = mine
        return ForwardBatch(
            token_ids=torch.cat([*ids, torch.zeros(padding, dtype=torch.int64)]),
            positions=torch.cat(positions),
            query_start=query_start,
            context_len=context,
            slot_ids=slots,
            page_table=table,
            logits_rows=query_start[1:].long() - 1,
            token_request=torch.repeat_interleave(torch.arange(size, dtype=torch.int32), count),
            one_token_each=bool((count == 1).all()),
            spare_slot=REQUESTS if padding else None,
        )

    def run(self, members: Sequence[int], counts: Sequence[int] = (), *, size: int = 0, width: int = NARROW) -> Answer:
        """One step from the state as it was; captured for `size` requests, or eager. One token each without counts."""
        batch = self.batch(members, counts or [1] * len(members), size or len(members), width)
        if not size:
            step, there = None, to(batch, self.rank.device)
        elif (size, width) not in self._steps:
            there = to(batch, self.rank.device)
            step = self._capture(lambda: self.rank.features(there))
            self._steps[size, width] = there, step
        else:
            there, step = self._steps[size, width]
            for name, value in vars(batch).items():
                if isinstance(value, Tensor):
                    getattr(there, name).copy_(value)
        self.rank.memory.pages.copy_(self._kept[0])
        self.rank.memory.slots.copy_(self._kept[1])
        with torch.inference_mode():
            logits = self.rank.model.logits(step() if step else self.rank.features(there))[: len(members)]
        assert logits.isfinite().all()
        mine = torch.tensor(members, device=self.rank.device)
        pages = self.pages[torch.tensor(members)].to(self.rank.device).long()
        return Answer(list(members), logits.clone(), self.rank.memory.slots[mine], self.rank.memory.pages[pages])


class Answer:
    """What a step made of its members: logits [B, vocab], bytes of their slots and pages."""

    def __init__(self, members: list[int], *parts: Tensor) -> None:
        self.members = members
        self.parts = parts

    def differing(self, other: Answer) -> dict[str, list[int]]:
        """Members of this that are otherwise in the other, by what differs."""
        rows = [other.members.index(member) for member in self.members]
        found = {}
        for name, mine, theirs in zip(("logits", "slots", "pages"), self.parts, other.parts, strict=True):
            same = (mine.flatten(1) == theirs[rows].flatten(1)).all(1).tolist()
            if not all(same):
                found[name] = [member for member, equal in zip(self.members, same, strict=True) if not equal]
        return found


def to(batch: ForwardBatch, device: torch.device) -> ForwardBatch:
    return ForwardBatch(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(batch).items()})


@pytest.fixture(scope="module")
def requests() -> Iterator[Requests]:
    sizes = PoolSizes(num_pages=REQUESTS * PAGES, num_slots=REQUESTS, max_model_len=WIDE * PAGE_TOKENS)
    yield Requests(build_rank(first_layers(flash(), LAYERS), sizes, "cuda:0", ranks=4))
    torch.cuda.empty_cache()


def test_a_decoded_request_is_the_same_in_every_company_order_and_size_of_step(requests: Requests) -> None:
    everyone = torch.randperm(REQUESTS, generator=torch.Generator().manual_seed(6)).tolist()
    together = requests.run(range(REQUESTS), size=512)
    companies = {
        "512 in another order": (everyone, 512, NARROW),
        "256": (everyone[:256], 256, NARROW),
        "64": (everyone[100:164], 64, WIDE),
        "64, of which 14 are padding": (everyone[300:350], 64, NARROW),
        "3, not captured": (everyone[:3], 0, WIDE),
        **{f"alone, context {requests.context[member]}": ([member], 1, WIDE) for member in (*range(14), 77, 500)},
    }
    odd = {}
    for name, (members, size, width) in companies.items():
        if differing := requests.run(members, size=size, width=width).differing(together):
            odd[name] = differing
    assert not odd


def test_a_chunk_is_the_same_alone_and_packed_with_others(requests: Requests) -> None:
    counts = {20: CHUNK, 21: 257, 22: 1, 23: 37, 11: 129, 0: 64, 30: 1, 12: 128, **dict.fromkeys(range(40, 45), CHUNK)}
    packed = requests.run(list(counts), list(counts.values()))
    odd = {}
    for members in ([23, 21], [22, 20], [0], [11], [12, 11], [30], [20], [22, 30], [21, 0, 12, 23], [44, 40]):
        answer = requests.run(members, [counts[member] for member in members], width=WIDE)
        if differing := answer.differing(packed):
            odd[str(members)] = differing
    assert not odd
