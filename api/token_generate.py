"""POST /inference/v1/generate: token ids in, token ids out, for callers that encode and decode themselves."""

from collections.abc import Sequence
from typing import Any

import msgspec
import orjson
from aiohttp import web

from api.body import decode
from api.constraints import check_formats, completion_constraint
from api.context import CONTEXT, REQUEST_ID
from api.errors import Problem
from api.handoff import first_token_body, leg_of
from api.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from api.plain_text import PlainText
from api.reader import Reader
from api.respond import now, respond
from api.sampling import LogprobsWanted, check, check_logprobs, check_max_tokens, check_token_ids, stop_strings
from api.schema import KvTransferParams, SamplingBody, StreamOptions
from api.sse import DONE
from api.submission import build_submission, response_id, truncated
from api.text_output import TextOutput, TextRules
from runtime.errors import RequestError
from runtime.requests import Tokens


class GenerateSampling(SamplingBody, frozen=True, kw_only=True):
    """`sampling_params`, under the names of the other endpoints."""

    logprobs: int | None = None


class GenerateBody(msgspec.Struct, frozen=True, kw_only=True):
    """The body."""

    token_ids: list[int]
    sampling_params: GenerateSampling = GenerateSampling()
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    request_id: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    kv_transfer_params: KvTransferParams | None = None

    def sampling(self) -> GenerateSampling:
        """Everything that shapes the generation, in one place."""
        return msgspec.structs.replace(
            self.sampling_params,
            model=self.model,
            stream=self.stream,
            stream_options=self.stream_options,
            request_id=self.request_id,
            priority=self.priority,
            cache_salt=self.cache_salt,
            kv_transfer_params=self.kv_transfer_params,
        )


async def generate(request: web.Request) -> web.StreamResponse:
    """The handler."""
    context = request.app[CONTEXT]
    arrived = now()
    decoded = decode(await request.read(), GenerateBody)
    body = decoded.sampling()
    with context.limiter.slot():
        context.model_of(body.model)
        leg = leg_of(body.kv_transfer_params, context.info)
        if leg.kind == "prefill":
            body = first_token_body(body)
        check(body, context.limits)
        check_formats(body)
        check_max_tokens(body.max_tokens, "max_tokens", body.min_tokens)
        check_logprobs(body.logprobs, "logprobs", context.limits)
        check_logprobs(body.prompt_logprobs, "prompt_logprobs", context.limits)
        if not decoded.token_ids:
            raise RequestError("token_ids: must not be empty", param="token_ids")
        check_token_ids(decoded.token_ids, "token_ids", context.limits.vocab_size)
        submission = await build_submission(
            context,
            body,
            response_id=response_id("", body.request_id, request[REQUEST_ID]),
            prompts=[truncated(decoded.token_ids, body, context.info.max_model_len)],
            prompt_param="token_ids",
            leg=leg,
            wanted=LogprobsWanted(sample=body.logprobs, prompt=body.prompt_logprobs),
            max_tokens=body.max_tokens,
            constraint=await completion_constraint(context, body),
        )
        rules = TextRules(
            stops=stop_strings(body),
            include_stop=bool(body.include_stop_str_in_output),
            min_tokens=body.min_tokens or 0,
        )
        shape = GenerateShape(
            response_id=submission.response_id,
            names=TokenNames(context.tokenizer),
            num_logprobs=body.logprobs,
            num_prompt_logprobs=body.prompt_logprobs,
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
        )
        return await respond(
            request,
            submission,
            [TextOutput(context.tokenizer, rules) for _ in submission.submits],
            lambda reader: GenerateResponse(reader, len(submission.submits), shape),
            stream=bool(body.stream),
            arrived=arrived,
        )


class GenerateShape(msgspec.Struct, frozen=True, kw_only=True):
    """What the caller wants to see."""

    response_id: str
    names: TokenNames
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    include_usage: bool = False


class GenerateResponse:
    """The choices of a response, as ids."""

    plain: Sequence[PlainText] = ()

    def __init__(self, reader: Reader, num_choices: int, shape: GenerateShape) -> None:
        self._reader = reader
        self._shape = shape
        self._choices: list[dict[str, Any]] = [
            {"index": number, "token_ids": [], "logprobs": None, "finish_reason": None, "stop_reason": None}
            for number in range(num_choices)
        ]
        self._prompt_logprobs: list[dict[str, dict[str, Any]] | None] | None = None

    def _read(self, arrived: Sequence[tuple[int, Tokens]]) -> list[dict[str, Any]]:
        entries = []
        for number, tokens, piece in self._reader.read(arrived):
            shape = self._shape
            if tokens.prompt_logprobs is not None and shape.num_prompt_logprobs is not None:
                self._prompt_logprobs = prompt_logprobs(tokens.prompt_logprobs, shape.names, shape.num_prompt_logprobs)
            logprobs = None
            if shape.num_logprobs is not None:
                logprobs = {"content": chat_logprobs(piece.logprobs, shape.names, shape.num_logprobs)}
            entries.append(
                {
                    "index": number,
                    "token_ids": list(piece.token_ids),
                    "logprobs": logprobs,
                    "finish_reason": piece.finish_reason,
                    "stop_reason": piece.stop_reason,
                }
            )
        return entries

    def start(self) -> bytes:
        return b""

    def feed(self, arrived: Sequence[tuple[int, Tokens]]) -> bytes:
        return b"".join(self._frame({"choices": [entry]}) for entry in self._read(arrived))

    def end(self) -> bytes:
        if not self._shape.include_usage:
            return DONE
        return self._frame({"choices": [], "usage": self._reader.usage.openai()}) + DONE

    def error(self, problem: Problem) -> bytes:
        return b"data: %b\n\n" % orjson.dumps(problem.body()) + DONE

    def _frame(self, body: dict[str, Any]) -> bytes:
        return b"data: %b\n\n" % orjson.dumps({"request_id": self._shape.response_id, **body})

    async def collect(self) -> dict[str, Any]:
        """Read to the end and answer the JSON body."""
        generation = self._reader.generation
        while generation.running:
            for entry in self._read(await generation.wait()):
                choice = self._choices[entry["index"]]
                choice["token_ids"] += entry["token_ids"]
                choice["finish_reason"], choice["stop_reason"] = entry["finish_reason"], entry["stop_reason"]
                if entry["logprobs"] is not None:
                    choice["logprobs"] = choice["logprobs"] or {"content": []}
                    choice["logprobs"]["content"] += entry["logprobs"]["content"]
        return {
            "request_id": self._shape.response_id,
            "choices": self._choices,
            "prompt_logprobs": self._prompt_logprobs,
            "usage": self._reader.usage.openai(),
        }
