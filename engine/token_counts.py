"""What each request with a penalty has seen: per id how often it was generated, and whether it is in the prompt.

One dense line per such request on the model's device, taken when it gets a row and given back with it. Memory grows by
doubling up to the most there ever were at once; requests without penalties cost nothing.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_FIRST_LINES = 8


class TokenCounts:
    """V = vocabulary, N = lines so far."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self.output_counts: Tensor = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        """int32 [N, V]."""
        self.in_prompt: Tensor = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        """bool [N, V]."""
        self._free: list[int] = []

    def take(self, prompt: NDArray[np.int64], generated: Sequence[int]) -> int:
        """A line that says what this request has seen so far."""
        if not self._free:
            self._grow()
        line = self._free.pop()
        self.in_prompt[line] = False
        self.in_prompt[line, torch.from_numpy(prompt).to(self._device, non_blocking=True)] = True
        self.output_counts[line] = 0
        if generated:
            ids = torch.tensor(generated).to(self._device, non_blocking=True)
            once = torch.ones(len(generated), dtype=torch.int32, device=self._device)
            self.output_counts[line].index_put_((ids,), once, accumulate=True)
        return line

    def give_back(self, line: int) -> None:
        self._free.append(line)

    def add(self, lines: Tensor, token_ids: Tensor) -> None:
        """One more token for each of these lines; both int64 [P], lines distinct."""
        self.output_counts[lines, token_ids] += 1

    def _grow(self) -> None:
        old = self.output_counts.shape[0]
        new = max(_FIRST_LINES, 2 * old)
        counts = torch.zeros((new, self._vocab_size), dtype=torch.int32, device=self._device)
        in_prompt = torch.zeros((new, self._vocab_size), dtype=torch.bool, device=self._device)
        counts[:old], in_prompt[:old] = self.output_counts, self.in_prompt
        self.output_counts, self.in_prompt = counts, in_prompt
        self._free.extend(range(new - 1, old - 1, -1))
