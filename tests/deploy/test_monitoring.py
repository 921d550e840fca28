"""Scrape targets, alerts and the dashboard use ports and metrics that exist."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.deploy.shipped import CONFIGS, DEPLOY, ROOT, http_port, load, placements
from tools.dashboard import DASHBOARD, render
from tools.metrics_reference import node_families, router_families, series

PROMETHEUS = DEPLOY / "prometheus"
WORD = re.compile(r"\btandem_\w+")


@pytest.fixture(scope="module")
def exported() -> set[str]:
    """Every series name that a node or a router exports."""
    return {name for family in (*node_families(), *router_families()) for name in series(family)}


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of every alert and panel."""
    for alert in alerts():
        yield alert["alert"], alert["expr"]
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def test_alerts_and_panels_ask_for_series_that_exist(exported: set[str]) -> None:
    asked = {name: where for where, query in queries() for name in WORD.findall(query)}
    assert len(asked) > 25
    missing = {name: where for name, where in asked.items() if name not in exported}
    assert missing == {}


def test_queries_are_balanced_and_the_labels_of_jobs_are_those_scraped() -> None:
    jobs = {job["job_name"] for job in yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text())["scrape_configs"]}
    for where, query in queries():
        for opening, closing in ("()", "[]", "{}"):
            assert query.count(opening) == query.count(closing), where
        for named in re.findall(r'job=~?"([^"]+)"', query):
            assert set(named.split("|")) <= jobs, where


def test_every_alert_has_a_severity_and_a_runbook_that_exists() -> None:
    for alert in alerts():
        assert alert["labels"]["severity"] in ("page", "ticket")
        file, _, anchor = alert["annotations"]["runbook"].partition("#")
        headings = re.findall(r"^#+ (.+)$", (ROOT / file).read_text(), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in anchors, alert["alert"]


def test_scrape_targets_are_the_ports_of_the_files() -> None:
    jobs = yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text())["scrape_configs"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in jobs}
    for file, place in placements("h200").items():
        config = load(CONFIGS / "h200" / file, place.module)
        assert targets[file.removesuffix(".yaml")] == [f"127.0.0.1:{http_port(config)}"]


def test_the_kubernetes_monitor_names_its_jobs_the_same() -> None:
    monitor = yaml.safe_load((DEPLOY / "kubernetes" / "monitoring.yaml").read_text())
    assert monitor["spec"]["jobLabel"] == "app.kubernetes.io/component"
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")


def test_the_dashboard_is_up_to_date_and_provisioned() -> None:
    assert DASHBOARD.read_text() == render(), "run python -m tools.dashboard"
    provisioning = DEPLOY / "grafana" / "provisioning"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "tandem.yaml").read_text())["providers"]
    compose = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())["services"]["grafana"]["volumes"]
    assert any(volume.endswith(f":{provider['options']['path']}:ro") for volume in compose)
    assert any(volume.startswith("../grafana/dashboards:") for volume in compose)


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
