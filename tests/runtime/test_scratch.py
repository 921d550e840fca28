"""Directories of nodes go with them, also when they were killed."""

import multiprocessing
import os
import signal
import stat
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from runtime.scratch import scratch_directory


@pytest.fixture(autouse=True)
def own_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def hold(told: Connection) -> None:
    with scratch_directory() as directory:
        told.send(directory)
        signal.pause()


def a_day_ago(directory: Path) -> None:
    os.utime(directory, times=(0, 0))


def test_nobody_else_can_enter_and_nothing_is_left():
    with scratch_directory() as name:
        directory = Path(name)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        (directory / "socket").touch()
    assert not directory.exists()


def test_what_a_killed_process_left_is_removed_by_the_next_one_and_nothing_else():
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    killed, living = (spawn.Process(target=hold, args=(there,)) for _ in range(2))
    killed.start()
    left = Path(here.recv())
    living.start()
    used = Path(here.recv())
    try:
        killed.kill()
        killed.join(60)
        assert left.exists()
        with scratch_directory():
            assert left.exists(), "it is too young to be told from one that is being set up"
        for directory in (left, used):
            a_day_ago(directory)
        with scratch_directory():
            assert not left.exists()
            assert used.exists()
    finally:
        living.kill()
        living.join(60)
