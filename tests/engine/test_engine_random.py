"""Two engines under everything that can happen, in any order: audited after every step, tokens checked at the end."""

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule

from runtime.requests import ReceiveState, SendState
from tests.engine.harness import Harness
from tests.engine.hash_lm import PAGE_TOKENS, VOCAB, greedy
from tests.engine.wire import Wire, WireConnector

LEGS = ["local", "p", "d", "pd", "pd"]
_REFERENCE = {}


def prompt_of(seed):
    length = 1 + seed * 7 % 50
    return np.random.default_rng(seed).integers(2, VOCAB, length).tolist()


def reference(seed):
    if seed not in _REFERENCE:
        _REFERENCE[seed] = greedy(prompt_of(seed), 40)
    return _REFERENCE[seed]


class Engines(RuleBasedStateMachine):
    """A prefill and a decode engine with few pages, and the wire between them."""

    mode = "in turn"
    names = Bundle("names")

    @initialize(policy=st.sampled_from(["fail", "recompute"]), pages=st.integers(8, 20), budget=st.integers(4, 40))
    def start(self, policy, pages, budget):
        self.wire = Wire()
        self.count = 0
        self.seeds = {}
        settings_of = {
            "num_pages": pages,
            "max_model_len": 7 * PAGE_TOKENS,
            "max_num_seqs": 4,
            "max_num_batched_tokens": budget,
            "max_held_requests": 2,
        }
        self.engines = []
        for _ in range(2):
            connector = WireConnector(self.wire)
            kind = type("ModeHarness", (Harness,), {"mode": self.mode})
            harness = kind(connector=connector, kv_load_failure_policy=policy, **settings_of)
            connector.model = harness.model
            self.engines.append(harness)
        self.prefill, self.decode = self.engines

    @rule(
        target=names, seed=st.integers(0, 30), count=st.integers(1, 40), legs=st.sampled_from(["local", "p", "d", "pd"])
    )
    def submit(self, seed, count, legs):
        self.count += 1
        name = f"{legs}-{self.count}"
        self.seeds[name] = seed, count
        prompt = prompt_of(seed)
        if legs == "local":
            self.decode.submit(name, prompt, max_tokens=count)
        if legs in ("p", "pd"):
            self.prefill.submit(f"p:{name}", prompt, handoff=SendState(transfer_id=name), max_tokens=count)
        if legs in ("d", "pd"):
            handoff = ReceiveState(transfer_id=name, source_address="x:1", source_epoch="")
            self.decode.submit(name, prompt, handoff=handoff, max_tokens=count)
        return name

    @rule(which=st.integers(0, 1), steps=st.integers(1, 6))
    def step(self, which, steps):
        for _ in range(steps):
            self.engines[which].step()

    @rule(name=names)
    def abort(self, name):
        for harness in self.engines:
            harness.engine.abort(name)
            harness.engine.abort(f"p:{name}")
            harness.engine.check_integrity()

    @rule(name=names)
    def release(self, name):
        for harness in self.engines:
            harness.engine.release(name)
            harness.engine.check_integrity()

    @rule(name=names)
    def deliver(self, name):
        self.wire.deliver(name)

    @rule(name=names, retryable=st.booleans())
    def fail_receive(self, name, retryable):
        if name in self.wire.receives:
            self.wire.fail(name, retryable=retryable)

    @rule(name=names, outcome=st.sampled_from(["expired", "failed"]))
    def end_send(self, name, outcome):
        if name in self.wire.sends:
            self.wire.end_send(name, outcome)

    @rule(name=names)
    def late_quiet(self, name):
        for harness in self.engines:
            if name in harness.connector.in_flight:
                harness.connector.quiet(name)

    @rule(which=st.integers(0, 1))
    def device_fault(self, which):
        harness = self.engines[which]
        if harness.engine.has_work and not harness.model.fail_next and harness.engine._failures_in_a_row == 0:
            harness.model.fail_next = 1

    def teardown(self):
        if not hasattr(self, "engines"):
            return
        for harness in self.engines:
            harness.model.fail_next = 0
        for _ in range(3000):
            for harness in self.engines:
                harness.step()
                for name in list(harness.connector.in_flight):
                    harness.connector.quiet(name)
            self.wire.pump()
            for name in list(self.wire.receives):
                if name not in self.wire.sends:
                    self.wire.fail(name)
            for name in list(self.wire.sends):
                if self.wire.sends[name]["first"] is not None and name not in self.wire.receives:
                    self.wire.end_send(name, "expired")
            if not any(harness.is_busy for harness in self.engines) and not self.wire.sends and not self.wire.receives:
                break
        else:
            raise AssertionError("never done")
        for harness in self.engines:
            harness.step()
            harness.assert_empty()
        for name, (seed, count) in self.seeds.items():
            tokens = self.decode.tokens.get(name, [])
            assert tokens == reference(seed)[: len(tokens)], name
            if name in self.decode.finished:
                assert len(tokens) == min(count, 7 * PAGE_TOKENS - len(prompt_of(seed)))


Engines.TestCase.settings = settings(
    deadline=None, max_examples=60, stateful_step_count=40, suppress_health_check=list(HealthCheck)
)
TestEngines = Engines.TestCase


class EnginesAhead(Engines):
    """The same when the device has not begun a step while the next one is decided."""

    mode = "ahead of a late device"


EnginesAhead.TestCase.settings = settings(
    deadline=None, max_examples=50, stateful_step_count=40, suppress_health_check=list(HealthCheck)
)
TestEnginesAhead = EnginesAhead.TestCase
