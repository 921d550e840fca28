"""What some machines cannot run is not collected, and the end of the report says why."""

import importlib.util
from typing import Any

import pytest

from tests.cluster import two_hosts

_ABSENT: dict[str, str] = {}
if importlib.util.find_spec("vllm_router") is None:
    _ABSENT["test_vllm_router.py"] = "vllm-router has no wheel for this machine"
if reason := two_hosts.why_not():
    _ABSENT["test_two_hosts.py"] = f"network namespaces cannot be made here: {reason}"

collect_ignore = list(_ABSENT)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, **_: Any) -> None:
    for name, reason in _ABSENT.items():
        terminalreporter.write_line(f"not collected: tests/cluster/{name}: {reason}")
