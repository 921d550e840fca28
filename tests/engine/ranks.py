"""Several ranks of a group in one process: a thread each, with real connections between them."""

import select
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.ports import free_port
from engine.lockstep import Lockstep
from engine.parallel import StepIntent, StepPlan
from engine.rank_group import RankGroup


class Rank:
    """What one thread works with."""

    def __init__(self, rank: int, size: int, port: int, timeout_s: float, terms: Mapping[str, str]) -> None:
        self.rank = rank
        self.size = size
        self.group = RankGroup(
            rank, size, host="127.0.0.1", meeting=f"127.0.0.1:{port}", device=torch.device("cpu"),
            timeout_s=60.0, terms=terms,
        )  # fmt: skip
        self.lockstep = Lockstep(self.group.mesh, size, timeout_s)

    def agree(self, num_tokens: int, *, decode_only: bool = True, num_logits: int = 0) -> StepPlan:
        """The plan of the next step that somebody runs."""
        while not num_tokens and not self.lockstep.busy:
            self.sleep()
        return self.lockstep.agree(StepIntent(num_tokens, decode_only, num_logits))

    def sleep(self, longest_s: float = 0.02) -> None:
        """Until somebody calls."""
        select.select([self.group.mesh], [], [], longest_s)


def run_ranks(
    size: int,
    body: Callable[[Rank], Any],
    timeout_s: float = 60.0,
    terms: Callable[[int], dict[str, str]] = lambda _: {},
) -> list[Any]:
    """`body` on every rank; results by rank. `timeout_s`: how long a rank waits for another in a round.

    Leaving is a round for those who stay, so nobody leaves before all bodies have ended.
    """
    port = free_port()
    all_ended = threading.Barrier(size)

    def one(number: int) -> Any:
        rank = Rank(number, size, port, timeout_s, terms(number))
        try:
            result = body(rank)
            all_ended.wait(100)
            return result
        except threading.BrokenBarrierError:
            return None  # another body failed, and says why
        except BaseException:
            all_ended.abort()
            raise
        finally:
            rank.lockstep.leave()
            rank.group.close()

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(one, number) for number in range(size)]
        return [future.result(timeout=120) for future in futures]
