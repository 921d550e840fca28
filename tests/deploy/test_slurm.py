"""The Slurm scripts run: with a stand-in for Python (and srun) that records what it was told and waits for SIGTERM."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.shipped import CONFIGS, DEPLOY, ROOT, command_line, load, placements, stop_s

SCRIPTS = sorted((DEPLOY / "slurm").glob("*.sbatch"))
SHELL = [*SCRIPTS, *sorted(DEPLOY.rglob("*.sh"))]

STAND_IN = """#!/bin/bash
# Writes down its words, GPUs and signals; ends at the first SIGTERM, or at once with the status in `die.MODULE`.
me="$RECORD/$$"
printf '%s\\n' "$@" > "$me.words"
echo "${CUDA_VISIBLE_DEVICES:-}" > "$me.gpus"
[ -f "$RECORD/die.$2" ] && exit "$(cat "$RECORD/die.$2")"
trap 'echo TERM >> "$me.signals"; sleep 0.3; exit 0' TERM
touch "$me.ready"
while :; do sleep 0.05; done
"""
SRUN = """#!/bin/bash
# Keeps the tray, then becomes the command.
tray=""
while [ "${1#--}" != "$1" ]; do
    [ "${1#--nodelist=}" != "$1" ] && tray=${1#--nodelist=}
    shift
done
echo "$tray" > "$RECORD/$$.tray"
exec "$@"
"""
SCONTROL = """#!/bin/bash
[ "$1 $2" = "show hostnames" ] && printf '%s\\n' ${3//,/ }
"""


class Job:
    """A script under way."""

    def __init__(self, script: Path, directory: Path, **environment: str) -> None:
        self.directory = directory
        for name, text in (("python", STAND_IN), ("srun", SRUN), ("scontrol", SCONTROL)):
            (directory / name).write_text(text)
            (directory / name).chmod(0o755)
        self.process = subprocess.Popen(
            ["bash", str(script)],
            cwd=ROOT,
            env={
                **os.environ,
                "PATH": f"{directory}:{os.environ['PATH']}",
                "TANDEM_PYTHON": str(directory / "python"),
                "RECORD": str(directory),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def until_ready(self, count: int) -> None:
        deadline = time.monotonic() + 10
        while len(list(self.directory.glob("*.ready"))) < count:
            assert time.monotonic() < deadline, self.process.communicate(timeout=1)
            time.sleep(0.02)

    def commands(self) -> list[tuple[list[str], str, str]]:
        """(words after `python -m`, GPUs, tray) of every process started."""
        found = []
        for path in sorted(self.directory.glob("*.words")):
            minus_m, *words = path.read_text().splitlines()
            assert minus_m == "-m"
            tray = path.with_suffix(".tray")
            gpus = path.with_suffix(".gpus").read_text().strip()
            found.append((words, gpus, tray.read_text().strip() if tray.exists() else ""))
        return found

    def signals(self) -> list[str]:
        return [path.read_text() for path in self.directory.glob("*.signals")]


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    started: list[Job] = []
    yield started
    for job in started:
        if job.process.poll() is None:
            os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_a_script_parses_and_shellcheck_finds_nothing(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    shellcheck = str(Path(sys.executable).with_name("shellcheck"))
    done = subprocess.run([shellcheck, "--shell=bash", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slurm_leaves_time_to_drain(script: Path) -> None:
    found = re.search(r"^#SBATCH --signal=B:TERM@(\d+)$", script.read_text(), re.MULTILINE)
    assert found is not None
    folder = script.stem
    for file, place in placements(folder).items():
        assert int(found[1]) > stop_s(load(CONFIGS / folder / file, place.module)), file


def test_the_h200_job_starts_the_described_processes_and_drains_them_once(tmp_path: Path, jobs: list[Job]) -> None:
    job = Job(DEPLOY / "slurm" / "h200.sbatch", tmp_path, TANDEM_MODEL="/data/flash")
    jobs.append(job)
    job.until_ready(3)
    described = placements("h200")
    seen = set()
    for words, gpus, _ in job.commands():
        module, file, overrides = command_line(words)
        place = described[Path(file).name]
        assert place.module == module
        assert gpus == ",".join(map(str, place.gpus))
        load(ROOT / file, module, overrides)
        assert overrides == ([] if module == "router" else ["engine.model=/data/flash"])
        seen.add(module)
    assert seen == {"router", "prefill_node", "decode_node"}
    job.process.terminate()
    assert job.process.wait(10) == 0
    # A second SIGTERM would have ended them at once instead of draining.
    assert job.signals() == ["TERM\n"] * 3


def test_a_process_that_dies_ends_the_h200_job_with_its_status(tmp_path: Path, jobs: list[Job]) -> None:
    (tmp_path / "die.decode_node").write_text("7")
    job = Job(DEPLOY / "slurm" / "h200.sbatch", tmp_path)
    jobs.append(job)
    assert job.process.wait(10) == 7


def test_the_gb200_job_gives_every_tray_its_role_and_name(tmp_path: Path, jobs: list[Job]) -> None:
    job = Job(DEPLOY / "slurm" / "gb200.sbatch", tmp_path, SLURM_JOB_NODELIST="t0,t1,t2,t3", PREFILL_TRAYS="1")
    jobs.append(job)
    job.until_ready(5)
    roles = {}
    for words, _, tray in job.commands():
        module, file, overrides = command_line(words)
        config = load(ROOT / file, module, overrides)
        if module == "router":
            assert tray == "t0"
            continue
        roles[tray] = module
        assert config.http_url.startswith(f"http://{tray}:")  # type: ignore[union-attr]
        assert config.transfer.host == tray  # type: ignore[union-attr]
        assert config.membership.routers == ("t0:30001",)  # type: ignore[union-attr]
    assert roles == {"t0": "prefill_node", "t1": "decode_node", "t2": "decode_node", "t3": "decode_node"}
    job.process.terminate()
    assert job.process.wait(10) == 0
    assert job.signals() == ["TERM\n"] * 5


def test_a_gb200_job_without_a_tray_to_decode_is_refused(tmp_path: Path, jobs: list[Job]) -> None:
    job = Job(DEPLOY / "slurm" / "gb200.sbatch", tmp_path, SLURM_JOB_NODELIST="t0,t1", PREFILL_TRAYS="2")
    jobs.append(job)
    out, _ = job.process.communicate(timeout=10)
    assert job.process.returncode == 1
    assert b"at least one must be left to decode" in out
