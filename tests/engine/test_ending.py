"""The order in which a rank lets go of its device, with peers that left and peers that are gone."""

from types import SimpleNamespace

import pytest
import torch

from engine import ending
from engine.ending import end_rank


class Rank:
    """Writes down what is done to it. `runs` waits for its device to fall quiet end in vain."""

    def __init__(self, monkeypatch, runs=0, lost=False):
        self.done = []
        self.runs = runs
        self.engine = SimpleNamespace(close=self.note("drop captured steps"))
        self.group = SimpleNamespace(
            rank=0, device=torch.device("cpu"), mesh=SimpleNamespace(is_lost=lost),
            abort=self.note("give the group up"), close=self.note("close the group"),
        )  # fmt: skip
        monkeypatch.setattr(ending, "wait_until_quiet", self.wait)
        monkeypatch.setattr(ending.faulthandler, "dump_traceback_later", lambda *_, exit: self.done.append("arm"))
        monkeypatch.setattr(ending.faulthandler, "cancel_dump_traceback_later", self.note("disarm"))

    def note(self, what):
        return lambda: self.done.append(what)

    def wait(self, device, timeout_s):
        self.done.append("wait")
        self.runs -= 1
        return self.runs < 0


@pytest.mark.parametrize(
    ("runs", "lost", "order"),
    [
        (0, False, ["wait", "drop captured steps", "close the group", "disarm"]),
        (0, True, ["give the group up", "wait", "drop captured steps", "close the group", "disarm"]),
        (1, False, ["wait", "give the group up", "wait", "drop captured steps", "close the group", "disarm"]),
    ],
)
def test_captured_steps_are_dropped_when_none_runs_any_more(monkeypatch, runs, lost, order):
    rank = Rank(monkeypatch, runs, lost)
    end_rank(rank.engine, rank.group)
    assert rank.done == ["arm", *order]


def test_captured_steps_that_never_end_are_kept_and_the_process_is_left_to_exit(monkeypatch, caplog):
    rank = Rank(monkeypatch, runs=99, lost=True)
    end_rank(rank.engine, rank.group)
    assert "drop captured steps" not in rank.done
    assert "disarm" not in rank.done
    assert rank.done[-1] == "close the group"
    assert "does not come to an end" in caplog.text


def test_a_rank_without_peers_or_without_an_engine_ends_as_well(monkeypatch):
    rank = Rank(monkeypatch)
    end_rank(rank.engine, None)
    end_rank(None, None)
    assert rank.done == ["drop captured steps"]
    end_rank(None, rank.group)
    assert rank.done[1:] == ["arm", "wait", "close the group", "disarm"]
