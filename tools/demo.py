"""One streamed chat request, shown as it arrives, with what it cost."""

import time

import aiohttp
import orjson

_PROMPT = "Explain in two sentences why prefill and decode run on different machines."


def metric(text: str, name: str) -> float:
    """The sum over all label sets of one Prometheus series; 0 when it is not there."""
    lines = (line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} ")))
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


async def demo(url: str, decode_metrics: str, max_tokens: int = 64) -> None:
    """Send it to `url`, print the answer and TTFT, tokens/s, bytes handed over and milliseconds of the hand-off."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:

        async def metrics() -> str:
            if not decode_metrics:
                return ""
            async with session.get(decode_metrics) as response:
                return await response.text()

        before = await metrics()
        body = {
            "messages": [{"role": "user", "content": _PROMPT}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        print(f"\nuser      | {_PROMPT}\nassistant | ", end="", flush=True)
        began = time.perf_counter()
        first = last = 0.0
        usage: dict[str, int] = {}
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            path = response.headers.get("X-Tandem-Path", "")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = orjson.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    text = choice["delta"].get("reasoning_content") or choice["delta"].get("content") or ""
                    if text:
                        last = time.perf_counter()
                        first = first or last
                        print(text.encode("unicode_escape").decode() if not text.isprintable() else text, end="")
        after = await metrics()
    tokens = usage.get("completion_tokens", 0)
    rate = (tokens - 1) / (last - first) if tokens > 1 and last > first else 0.0
    print(f"\n\nTTFT {1000 * (first - began):.1f} ms, {rate:.0f} tokens/s, ", end="")
    print(f"{usage.get('prompt_tokens', 0)} prompt + {tokens} generated tokens", end="")
    if decode_metrics:
        moved = metric(after, "tandem_handoff_bytes_total") - metric(before, "tandem_handoff_bytes_total")
        took = metric(after, "tandem_handoff_seconds_sum") - metric(before, "tandem_handoff_seconds_sum")
        print(f", {moved / 1024:.1f} KiB of state handed over in {1000 * took:.1f} ms", end="")
    print(f" (path: {path})" if path else "", flush=True)
