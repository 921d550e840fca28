"""One streamed request as `tools.bench` sees it: sent, timed event by event, and judged complete or not."""

from __future__ import annotations

import time
from typing import Any

import aiohttp
import msgspec
import orjson

from tools.bench_workload import Job


class Record(msgspec.Struct, kw_only=True):
    """What happened to one request. Times are seconds."""

    slip_s: float
    """How much later than its arrival time it was sent: the client's own lag, or the wait for its place. 0 without."""
    prompt_tokens: int
    sent_s: float = 0.0
    """After the start of the run."""
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    gaps_s: list[float] = []
    """Between the events that carried output, in order."""
    output_tokens: int = 0
    error: str | None = None
    """None when it ended as it should."""

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first."""
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where requests go and how their bodies look."""

    url: str
    """Up to and without /v1."""
    model: str
    kind: str
    """completions: prompts as token ids; chat: the ids as words of one user message."""
    headers: dict[str, str]
    extra_body: dict[str, Any]
    ignore_eos: bool
    idle_timeout_s: float
    """Longest silence of a server before the request counts as failed."""

    @property
    def address(self) -> str:
        return f"{self.url}/v1/{'chat/completions' if self.kind == 'chat' else 'completions'}"

    def body(self, job: Job) -> bytes:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": job.output_len,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.kind == "chat":
            body["messages"] = [{"role": "user", "content": " ".join(map(str, job.prompt_ids.tolist()))}]
        else:
            body["prompt"] = job.prompt_ids
        if self.ignore_eos:
            body["ignore_eos"] = True
        return orjson.dumps(body | self.extra_body, option=orjson.OPT_SERIALIZE_NUMPY)


async def send(session: aiohttp.ClientSession, endpoint: Endpoint, job: Job, started: float) -> Record:
    """Send one request and follow its stream to the end. Failures are in the record, none is raised."""
    body = endpoint.body(job)
    sent = time.perf_counter()
    slip_s = 0.0 if job.arrives_s is None else sent - started - job.arrives_s
    record = Record(slip_s=slip_s, sent_s=sent - started, prompt_tokens=len(job.prompt_ids))
    timeout = aiohttp.ClientTimeout(total=None, connect=endpoint.idle_timeout_s, sock_read=endpoint.idle_timeout_s)
    headers = {"content-type": "application/json", **endpoint.headers}
    try:
        async with session.post(endpoint.address, data=body, headers=headers, timeout=timeout) as response:
            if response.status != 200:
                record.error = f"HTTP {response.status}: {_reason(await response.read())}"
            else:
                await _follow(response, record, sent, chat=endpoint.kind == "chat")
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, LookupError, TypeError) as error:
        record.error = f"{type(error).__name__}: {error}".removesuffix(": ")
    if record.error is not None:
        record.e2e_s = time.perf_counter() - sent
    return record


async def _follow(response: aiohttp.ClientResponse, record: Record, sent: float, *, chat: bool) -> None:
    last = sent
    events = 0
    finished = done = False
    buffer = b""
    async for chunk in response.content.iter_any():
        now = time.perf_counter()
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                done = True
                continue
            event = orjson.loads(data)
            if "error" in event:
                record.error = f"error event: {_reason(data)}"
                return
            if usage := event.get("usage"):
                record.output_tokens = usage["completion_tokens"]
                record.prompt_tokens = usage["prompt_tokens"]
            for choice in event.get("choices") or ():
                finished |= choice.get("finish_reason") is not None
                if _carries_output(choice, chat=chat):
                    if events:
                        record.gaps_s.append(now - last)
                    else:
                        record.ttft_s = now - sent
                    events, last = events + 1, now
    record.e2e_s = last - sent
    record.output_tokens = record.output_tokens or events
    if not finished or not done:
        record.error = f"cut after {events} events"
    elif not events:
        record.error = "no output"


def _carries_output(choice: dict[str, Any], *, chat: bool) -> bool:
    """Completions stream an event per token even where a token completes no character; chat has events without any."""
    if not chat:
        return bool(choice.get("text")) or choice.get("finish_reason") is None
    delta = choice.get("delta") or {}
    return any(delta.get(key) for key in ("content", "reasoning_content", "reasoning", "tool_calls"))


def _reason(body: bytes) -> str:
    """The message inside an error body, or its beginning."""
    try:
        error = orjson.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:200]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
