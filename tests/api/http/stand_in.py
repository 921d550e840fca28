"""A small honest engine: it computes tokens from the prompt and the sampling parameters, one a step, and tells what it
was asked. No model, no transfers, but everything that the HTTP surface relies on."""

import asyncio
import hashlib
import math
from collections import deque
from collections.abc import Sequence

from api.backend import EngineInfo, TokenQueue, failure
from api.tokenizer import Tokenizer
from runtime.errors import EngineError
from runtime.requests import EngineStats, RequestFailed, SendState, Submit, TokenLogprobs, Tokens


class StandInEngine:
    """Implements `api.backend.EngineClient`.

    Without a script a request's token t is a hash of (prompt, t), and of the seed unless it is greedy. A script is
    played to the next request instead, ended by EOS. `step_s` is the time between two tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_model_len: int = 4096,
        role: str = "standalone",
        num_ranks: int = 1,
        step_s: float = 0.0,
        tokens_per_step: int = 1,
    ) -> None:
        self.info = EngineInfo(
            model_id="tiny",
            max_model_len=max_model_len,
            vocab_size=tokenizer.vocab_size,
            role=role,  # type: ignore[arg-type]
            num_ranks=num_ranks,
            created=1_700_000_000,
        )
        self.tokenizer = tokenizer
        self.step_s = step_s
        self.tokens_per_step = tokens_per_step
        self.submitted: list[Submit] = []
        self.ranks_used: list[int | None] = []
        self.aborted: list[str] = []
        self.released: list[str] = []
        self.cache_resets = 0
        self.trouble: str | None = None
        self.fail_next: RequestFailed | None = None
        self.fail_after = 0
        """Tokens that a request which `fail_next` ends still gets."""
        self.cached_tokens = 0
        self.counts_prompts = True
        """The first and the last step tell the length of the prompt."""
        self._scripts: deque[list[int]] = deque()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._generated = 0
        # Letters, digits and spaces: text that no parser takes for markup.
        self._words = [tokenizer.encode(character)[0] for character in "abcdefghijklmnopqrstuvwxyz 0123456789"]

    @property
    def num_running(self) -> int:
        return len(self._running)

    def script(self, text: str) -> None:
        """The next request that has no script yet generates this text; control tokens may be spelled out."""
        self._scripts.append(self.tokenizer.encode(text))

    async def generate(self, request: Submit, *, rank: int | None = None) -> TokenQueue:
        if self.trouble is not None:
            raise EngineError(self.trouble)
        assert request.request_id not in self._running
        self.submitted.append(request)
        self.ranks_used.append(rank)
        queue = TokenQueue(request.request_id, self._abort, rank or 0)
        failed, self.fail_next = self.fail_next, None
        script = self._scripts.popleft() if self._scripts else None
        self._running[request.request_id] = asyncio.create_task(self._run(request, queue, script, failed))
        return queue

    def _abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self._running.pop(request_id).cancel()

    async def _run(
        self, request: Submit, queue: TokenQueue, script: list[int] | None, failed: RequestFailed | None
    ) -> None:
        sampling = request.sampling
        ids = self._ids(request, script)
        first = len(request.generated_ids)
        if failed is not None:
            ids = ids[: self.fail_after]
        if isinstance(request.handoff, SendState):
            ids = ids[: first + 1]
        position = first
        while position < len(ids):
            await asyncio.sleep(self.step_s)
            step = ids[position : position + self.tokens_per_step]
            finish, used = self._finish(request, ids, position, len(step))
            step = step[:used]
            self._generated += len(step)
            if finish is not None:
                del self._running[request.request_id]
            tells = self.counts_prompts and (position == first or finish is not None)
            queue.push(
                Tokens(
                    request_id=request.request_id,
                    token_ids=tuple(step),
                    logprobs=tuple(self._logprobs(token_id, sampling.logprobs) for token_id in step)
                    if sampling.logprobs is not None
                    else (),
                    finish_reason=finish,
                    stop_token_id=step[-1] if finish == "stop" and step[-1] in sampling.stop_token_ids else None,
                    prompt_tokens=len(request.prompt_ids) if tells else 0,
                    cached_tokens=self.cached_tokens if tells else 0,
                    prompt_logprobs=self._prompt_logprobs(request) if position == first else None,
                )
            )
            if finish is not None:
                return
            position += used
        await asyncio.sleep(self.step_s)
        del self._running[request.request_id]
        if failed is None:
            raise AssertionError("a request ran out of tokens")
        queue.fail(failure(failed))

    def _ids(self, request: Submit, script: list[int] | None) -> list[int]:
        sampling = request.sampling
        if script is not None:
            return [*script, self.tokenizer.eos_id]
        seed = 0 if sampling.temperature == 0 else sampling.seed
        words = list(sampling.allowed_token_ids) or self._words
        digest = hashlib.blake2b(repr((request.prompt_ids, seed)).encode(), digest_size=8).digest()
        return [words[(digest[t % 8] * (t + 1)) % len(words)] for t in range(sampling.max_tokens)]

    def _finish(self, request: Submit, ids: Sequence[int], position: int, count: int) -> tuple[str | None, int]:
        sampling = request.sampling
        for offset in range(count):
            number = position + offset + 1
            token_id = ids[position + offset]
            is_stop = token_id in sampling.stop_token_ids
            is_eos = token_id == self.tokenizer.eos_id and not sampling.ignore_eos
            if (is_stop or is_eos) and number >= sampling.min_tokens:
                return "stop", offset + 1
            if number >= sampling.max_tokens:
                return "length", offset + 1
        return None, count

    def _logprobs(self, token_id: int, count: int) -> TokenLogprobs:
        """The token itself first, then its neighbours, each half as likely as the one before."""
        size = self.info.vocab_size
        top = [(token_id + k) % size for k in range(size if count == -1 else count)]
        return TokenLogprobs(
            token_id=token_id,
            logprob=math.log(0.5),
            rank=1,
            top_ids=tuple(top),
            top_logprobs=tuple(-math.log(2) * (k + 1) if k < 40 else -math.inf for k in range(len(top))),
        )

    def _prompt_logprobs(self, request: Submit) -> tuple[TokenLogprobs | None, ...] | None:
        count = request.sampling.prompt_logprobs
        if count is None:
            return None
        return (None, *(self._logprobs(token_id, count) for token_id in request.prompt_ids[1:]))

    def release(self, transfer_id: str) -> None:
        self.released.append(transfer_id)

    def reset_prefix_cache(self) -> None:
        self.cache_resets += 1

    def health(self) -> str | None:
        return self.trouble

    def ranks(self) -> Sequence[EngineStats]:
        return [
            EngineStats(
                rank=rank,
                running=len(self._running) if rank == 0 else 0,
                pages_total=100,
                pages_free=75,
                slots_total=10,
                slots_free=10,
                generated_tokens=self._generated if rank == 0 else 0,
            )
            for rank in range(self.info.num_ranks)
        ]
