"""An engine with the stand-in model, driven step by step, audited after each."""

from engine.config import EngineConfig
from engine.engine import Engine
from engine.intake import EngineShape
from runtime.requests import Handover, RequestFailed, SamplingParams, StepOutput, Submit
from tests.engine.hash_lm import EOS, PAGE_TOKENS, VOCAB, HashLM
from tests.engine.late_device import LateDevice

MODES = {
    "in turn": {},
    "ahead": {"async_scheduling": "on"},
    "ahead of a late device": {"async_scheduling": "on"},
    "padded": {"cudagraph_capture_sizes": (1, 3, 8)},
    "ahead and padded": {"async_scheduling": "on", "cudagraph_capture_sizes": (2, 5, 8)},
}
"""How steps are launched; the tokens are always the same."""


def make_config(**settings):
    defaults = {
        "model": "unused",
        "block_size": PAGE_TOKENS,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_held_requests": 4,
    }
    return EngineConfig(**{**defaults, **settings})


def submit(request_id, prompt, *, handoff=None, priority=0, generated=(), **sampling):
    params = SamplingParams(**{"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, **sampling})
    return Submit(
        request_id=request_id,
        prompt_ids=tuple(prompt),
        sampling=params,
        handoff=handoff,
        priority=priority,
        generated_ids=tuple(generated),
    )


class Harness:
    """Collects what an engine says, per request."""

    mode = "in turn"

    def __init__(self, *, num_pages=64, max_model_len=256, connector=None, constraints=None, parallel=None, **settings):
        settings = {**MODES[self.mode], **settings}
        if "cudagraph_capture_sizes" in settings:
            most = settings.get("max_num_seqs", 8)
            sizes = {min(size, most) for size in settings["cudagraph_capture_sizes"]}
            settings["cudagraph_capture_sizes"] = tuple(sorted(sizes))
        self.config = make_config(**settings)
        num_slots = self.config.max_num_seqs + self.config.max_held_requests
        self.model = HashLM(num_pages, num_slots)
        self.shape = EngineShape(
            vocab_size=VOCAB,
            eos_ids=(EOS,),
            max_model_len=max_model_len,
            page_tokens=PAGE_TOKENS,
            num_pages=num_pages,
            num_slots=num_slots,
        )
        self.engine = Engine(
            self.config, self.shape, self.model, connector=connector, constraints=constraints, parallel=parallel
        )
        if self.mode == "ahead of a late device":
            self.engine._runner = LateDevice(self.engine._runner)
        self.connector = connector
        self.tokens = {}
        self.messages = {}
        self.failures = {}
        self.finished = {}
        self.handovers = {}
        self.others = []

    def submit(self, request_id, prompt, **options):
        self.engine.submit(submit(request_id, prompt, **options))

    def step(self):
        said = self.engine.step()
        self.engine.check_integrity()
        for message in said:
            match message:
                case StepOutput():
                    for output in message.outputs:
                        assert output.request_id not in self.finished, "tokens after the end"
                        assert output.request_id not in self.failures, "tokens after a failure"
                        self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
                        self.messages.setdefault(output.request_id, []).append(output)
                        if output.finish_reason is not None:
                            self.finished[output.request_id] = output.finish_reason
                case RequestFailed():
                    assert message.request_id not in self.finished
                    self.failures[message.request_id] = message
                case Handover():
                    self.handovers[message.request_id] = message
                case _:
                    self.others.append(message)
        return said

    @property
    def is_busy(self):
        """A worker would call `step` now: there is work, or an event woke it."""
        return self.engine.has_work or bool(self.connector is not None and self.connector.events)

    def run(self, max_steps=2000):
        """Step until nothing is left to do at once."""
        for _ in range(max_steps):
            self.step()
            if not self.is_busy:
                return self
        raise AssertionError(f"still busy after {max_steps} steps")

    def assert_empty(self):
        """Everything was given back."""
        stats = self.engine.stats()
        assert (stats.pages_free, stats.slots_free) == (stats.pages_total, stats.slots_total)
        assert stats.running == stats.waiting == stats.receiving == stats.held == 0
