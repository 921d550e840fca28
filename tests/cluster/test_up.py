"""The newcomer's command: everything starts, proves itself, answers, and leaves no process behind."""

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

from tests.cluster.harness import ROOT, free_port


def local_configs(directory: Path, checkpoint: Path) -> Path:
    """The files of configs/local with free ports instead of the documented ones."""
    shutil.copytree(ROOT / "configs" / "local", directory)
    ports = {str(port): str(free_port()) for port in (30000, 30001, 8000, 8001)}
    for path in directory.glob("*.yaml"):
        text = re.sub(r"\b(30000|30001|8000|8001)\b", lambda match: ports[match[0]], path.read_text())
        path.write_text(text.replace(".cache/tiny-v4", str(checkpoint)))
    return directory / "cluster.yaml"


def test_one_command_serves_and_one_signal_ends_it(tmp_path: Path, tiny_checkpoint: Path) -> None:
    config = local_configs(tmp_path / "configs", tiny_checkpoint)
    url = yaml.safe_load(config.read_text())["url"]
    began = time.monotonic()
    launcher = subprocess.Popen(
        [sys.executable, "-u", "-m", "tools.up", "--config", str(config), "--demo"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    family = psutil.Process(launcher.pid)
    lines: list[str] = []
    try:
        assert launcher.stdout is not None
        for line in launcher.stdout:
            lines.append(line)
            if line.startswith(f"serving on {url}"):
                break
            assert time.monotonic() - began < 60, "".join(lines)
        output = "".join(lines)
        assert f"serving on {url}" in output, output
        shown = re.search(
            r"TTFT ([\d.]+) ms, (\d+) tokens/s, (\d+) prompt \+ (\d+) generated tokens, "
            r"([\d.]+) KiB of state handed over in ([\d.]+) ms \(path: handoff\)",
            output,
        )
        assert shown is not None, output
        assert all(float(value) > 0 for value in shown.groups()), output
        started = family.children(recursive=True)
        assert len(started) >= 5, "router, two nodes, two engine ranks"
        launcher.send_signal(signal.SIGINT)
        rest = launcher.stdout.read()
        assert launcher.wait(30) == 0, output + rest
    finally:
        launcher.kill()
        launcher.wait()
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive, f"still there: {[process.cmdline() for process in alive]}"
