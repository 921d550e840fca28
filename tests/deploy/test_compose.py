"""compose.yaml says what configs/h200 and its topology say."""

import re
from typing import Any

import pytest
import yaml

from tests.deploy.shipped import CONFIGS, DEPLOY, command_line, http_port, load, placements, stop_s

FILE = DEPLOY / "compose" / "compose.yaml"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(FILE.read_text())["services"]
OURS = ["router", "prefill", "decode"]


def source_of(volume: str) -> str:
    """Host side of a short volume, with the default of its variable."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).partition(":")[0]


def test_the_whole_deployment_is_there_and_shares_the_host() -> None:
    assert set(OURS) <= set(SERVICES)
    assert {SERVICES[name]["network_mode"] for name in SERVICES} == {"host"}
    assert {"profiles"} <= set(SERVICES["prometheus"]) & set(SERVICES["grafana"])


@pytest.mark.parametrize("name", OURS)
def test_a_service_runs_its_file_on_its_gpus_and_has_time_to_drain(name: str) -> None:
    service = SERVICES[name]
    module, file, overrides = command_line(service["command"])
    mounts = {volume.split(":")[-2]: source_of(volume) for volume in service["volumes"] if volume.count(":") >= 2}
    assert (FILE.parent / mounts["/configs"]).resolve() == CONFIGS / "h200"
    config = load(CONFIGS / "h200" / file.removeprefix("/configs/"), module, overrides)
    place = placements("h200")[file.removeprefix("/configs/")]
    assert place.module == module
    assert float(service["stop_grace_period"].removesuffix("s")) > stop_s(config)
    assert f"127.0.0.1:{http_port(config)}/" in service["healthcheck"]["test"][-1]
    if name == "router":
        assert "deploy" not in service
        return
    (devices,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert tuple(map(int, devices["device_ids"])) == place.gpus
    assert float(service["healthcheck"]["start_period"].removesuffix("s")) >= config.ready_timeout_s  # type: ignore[union-attr]
    assert config.engine.model.startswith("/models/")  # type: ignore[union-attr]
    assert "/models" in mounts
    # Registered memory is locked memory.
    assert service["ulimits"]["memlock"] == {"soft": -1, "hard": -1}
    assert service["cap_add"] == ["IPC_LOCK"]


def test_every_bind_mount_of_the_repository_exists() -> None:
    for service in SERVICES.values():
        for volume in service["volumes"]:
            source = source_of(volume)
            if source.startswith("."):
                assert (FILE.parent / source).resolve().is_dir(), source
