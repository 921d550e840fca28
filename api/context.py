"""What every handler of the HTTP surface needs, made once by `build_app`."""

import time
from pathlib import Path

from aiohttp import web

from api.backend import EngineClient, EngineInfo
from api.encoding.effort import EffortProfile, detect_profile
from api.generation import Generation
from api.grammar_request import GrammarPlanner
from api.limiter import Limiter
from api.metrics import ApiMetrics
from api.response_store import ResponseStore
from api.sampling import Limits
from api.settings import ApiSettings
from api.tokenizer import Tokenizer
from api.turn import Turn
from runtime.errors import RequestError


class Context:
    """The parts behind the endpoints. Shared, and not changed after the start."""

    def __init__(self, engine: EngineClient, tokenizer: Tokenizer, settings: ApiSettings, metrics: ApiMetrics) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.settings = settings
        self.metrics = metrics
        self.grammars = GrammarPlanner(tokenizer)
        self.store = ResponseStore(settings.response_store_entries, settings.response_store_bytes)
        self.live: set[Generation] = set()
        """What is generating now."""
        self.turn = Turn()
        self.limiter = Limiter(settings.max_concurrent_requests)
        self.created = engine.info.created or self.unix_time()
        if settings.reasoning_effort_profile == "auto":
            self.effort_profile = detect_profile(Path(engine.info.checkpoint))
        else:
            self.effort_profile = EffortProfile(settings.reasoning_effort_profile)
        self.longest_token_bytes = max(map(len, tokenizer.bytes_of))
        self.limits = Limits(
            vocab_size=engine.info.vocab_size,
            max_model_len=engine.info.max_model_len,
            max_logprobs=settings.max_logprobs,
            max_choices=settings.max_choices,
            max_stop_strings=settings.max_stop_strings,
        )

    @staticmethod
    def unix_time() -> int:
        """Seconds, for `created` fields."""
        return int(time.time())

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names a request may use; the first one is reported."""
        return self.settings.served_model_name or (self.info.model_id,)

    def model_of(self, asked: str | None) -> str:
        """The name to report back. Raises RequestError (404) for a model that is not served here."""
        if asked is None:
            return self.model_names[0]
        if asked not in self.model_names:
            raise RequestError(
                f"The model `{asked[:100]}` does not exist. This server has: {', '.join(self.model_names)}.",
                param="model",
                status=404,
                code="model_not_found",
            )
        return asked

    def rank_of(self, request: web.Request) -> int | None:
        """The data-parallel rank that `x-data-parallel-rank` asks for; what is no integer is ignored."""
        text = request.headers.get("x-data-parallel-rank", "").strip()
        if not text.isascii() or not text.removeprefix("-").isdigit() or len(text) > 10:
            return None
        rank = int(text)
        if not 0 <= rank < self.info.num_ranks:
            raise RequestError(
                f"x-data-parallel-rank: {rank} does not exist, this node has ranks 0..{self.info.num_ranks - 1}",
                param="x-data-parallel-rank",
            )
        return rank


CONTEXT = web.AppKey("CONTEXT", Context)
REQUEST_ID = web.RequestKey("REQUEST_ID", str)
