"""Captured steps hold what they launch, collectives with their communicator among it: they must be gone when asked."""

import gc
import weakref

import pytest

from engine import engine as engine_module
from tests.engine.harness import Harness


class Graphs:
    """Captures the first `room` steps and remembers which of them live."""

    def __init__(self, room):
        self._room = room
        self._made = []

    def capture(self, run):
        if len(self._made) == self._room:
            raise RuntimeError("no room for another step")

        def replay():
            return run()

        self._made.append(weakref.ref(replay))
        return replay

    @property
    def alive(self):
        gc.collect()
        return sum(made() is not None for made in self._made)


@pytest.fixture
def graphs(monkeypatch, request):
    made = Graphs(request.param)
    monkeypatch.setattr(engine_module, "no_capture", made.capture)
    return made


@pytest.mark.parametrize("graphs", [2], indirect=True)
def test_a_closed_engine_holds_no_captured_step(graphs):
    harness = Harness(cudagraph_capture_sizes=(2, 4))
    assert graphs.alive == 2
    harness.engine.close()
    assert graphs.alive == 0


@pytest.mark.parametrize("graphs", [1], indirect=True)
def test_steps_captured_before_one_failed_are_given_up(graphs):
    with pytest.raises(RuntimeError, match="no room") as failure:
        Harness(cudagraph_capture_sizes=(2, 4))
    assert failure.tb is not None, "what the error passed through is still there"
    assert graphs.alive == 0
