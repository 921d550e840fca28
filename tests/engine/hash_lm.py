"""A deterministic stand-in for the model whose state really lives in the pages and the slot it is given.

Every token leaves a digest in its page; the slot holds a running chain. The logits at a position depend on all digests
read back from the pages and on the chain, so a wrong page, slot, position, order or stale byte gives other tokens.
`expected_logits` computes the same from the tokens alone.
"""

from itertools import pairwise

import numpy as np
import torch

PAGE_TOKENS = 16
VOCAB = 97
EOS = 1
_DIGEST = 8
_START = 0x1234_5678_9ABC_DEF1
_MASK = (1 << 64) - 1


def mix(z):
    """uint64 array -> uint64 array, one to one."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def advance(chain, digest):
    """The chain after one more token; Python integers."""
    z = (chain + digest) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    return z ^ (z >> 27)


def digests(tokens, positions):
    return mix(tokens.astype(np.uint64) * np.uint64(1_000_003) + positions.astype(np.uint64) * np.uint64(7919))


def logits_of(history, chain):
    weights = 2 * np.arange(len(history), dtype=np.uint64) + np.uint64(1)
    key = mix((history * weights).sum(dtype=np.uint64, keepdims=True) ^ np.uint64(chain))
    bits = mix(key + np.arange(VOCAB, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 22) - np.float32(2)


def expected_logits(tokens):
    """Next-token logits float32 [VOCAB] after `tokens`, from nothing but the tokens."""
    tokens = np.asarray(tokens, np.int64)
    history = digests(tokens, np.arange(len(tokens)))
    chain = _START
    for digest in history.tolist():
        chain = advance(chain, digest)
    return logits_of(history, chain)


class HashLM:
    """`forward` for an engine. Pools are poisoned, so that stale or foreign bytes cannot pass for zeros."""

    def __init__(self, num_pages, num_slots, page_tokens=PAGE_TOKENS):
        self.page_tokens = page_tokens
        self.pages = torch.full((num_pages, page_tokens * _DIGEST), 0xA5, dtype=torch.uint8)
        self.slots = torch.full((num_slots + 1, 16), 0x5A, dtype=torch.uint8)
        self.spare_slot = num_slots
        self.batches = []
        self.fail_next = 0

    def __call__(self, batch):
        if self.fail_next:
            self.fail_next -= 1
            raise RuntimeError("the device is on fire")
        pages = self.pages.numpy().view(np.uint64)
        slots = self.slots.numpy().view(np.uint64)
        tokens, positions = batch.token_ids.numpy(), batch.positions.numpy()
        starts, contexts = batch.query_start.tolist(), batch.context_len.tolist()
        assert starts[-1] == len(tokens) == len(positions)
        self.batches.append([end - start for start, end in pairwise(starts)])
        wanted = {row: place for place, row in enumerate(batch.logits_rows.tolist())}
        logits = np.full((len(batch.logits_rows), VOCAB), np.nan, np.float32)
        used_slots = batch.slot_ids.tolist()
        real = [slot for slot in used_slots if slot != self.spare_slot]
        assert len(set(real)) == len(real)
        assert used_slots[: len(real)] == real, "padding comes last"
        for b, slot in enumerate(used_slots):
            start, end, context = starts[b], starts[b + 1], contexts[b]
            assert positions[start:end].tolist() == list(range(context, context + end - start))
            if slot == self.spare_slot:
                assert (context, end - start) == (0, 1)
                continue
            table = batch.page_table[b].numpy()
            chain = int(slots[slot, 0]) if context else _START
            new = digests(tokens[start:end], positions[start:end])
            for row in range(start, end):
                position = positions[row]
                pages[table[position // self.page_tokens], position % self.page_tokens] = new[row - start]
                chain = advance(chain, int(new[row - start]))
                if row in wanted:
                    used = table[: position // self.page_tokens + 1]
                    history = pages[used].reshape(-1)[: position + 1]
                    logits[wanted[row]] = logits_of(history, chain)
            slots[slot, 0] = chain
        return torch.from_numpy(logits)


def greedy(prompt, count):
    """The tokens a correct engine generates greedily, EOS not looked at."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(expected_logits(tokens))))
    return tokens[len(prompt) :]
