"""Write deploy/grafana/dashboards/tandem.json: the Grafana dashboard, from a table of panels.

    python -m tools.dashboard [--check]

`--check` writes nothing and exits 1 when the file is out of date.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

DASHBOARD = Path(__file__).resolve().parents[1] / "deploy" / "grafana" / "dashboards" / "tandem.json"

_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS = 24
_HEIGHT = 8


class Panel(NamedTuple):
    """One graph. `queries` are (PromQL, legend)."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    about: str = ""


def quantiles(metric: str) -> tuple[tuple[str, str], ...]:
    """p50, p90 and p99 of a histogram."""
    return tuple(
        (f"histogram_quantile({q}, sum by (le) (rate({metric}_bucket[$__rate_interval])))", f"p{name}")
        for q, name in (("0.5", "50"), ("0.9", "90"), ("0.99", "99"))
    )


def per_rank(metric: str) -> tuple[tuple[str, str], ...]:
    """A gauge of every rank."""
    return ((metric, "{{job}} {{instance}} rank {{engine}}"),)


def rate(metric: str, by: str) -> tuple[tuple[str, str], ...]:
    legend = " ".join(f"{{{{{label.strip()}}}}}" for label in by.split(","))
    return ((f"sum by ({by}) (rate({metric}[$__rate_interval]))", legend),)


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "What users feel",
        (
            Panel("Healthy", "bool_yes_no", (("min(tandem_router_healthy)", "every router"),),
                  "A request really went through prefill, hand-off and decode within the proof age."),
            Panel("Answers", "reqps", rate("tandem_router_requests_total", "path, status")),
            Panel("Running", "short", (("sum(tandem_router_requests_running)", "requests"),)),
            Panel("Time to first token", "s", quantiles("tandem_router_time_to_first_token_seconds")),
            Panel("Inter-token latency", "s", quantiles("tandem_inter_token_latency_seconds")),
            Panel("Whole request", "s", quantiles("tandem_router_request_seconds")),
        ),
    ),
    (
        "Failures",
        (
            Panel("Errors of the router", "reqps", rate("tandem_router_failures_total", "code")),
            Panel("Legs tried again", "reqps", rate("tandem_router_retries_total", "leg, step")),
            Panel("Clients gone, streams continued elsewhere, streams broken", "reqps", (
                *rate("tandem_router_client_disconnects_total", "job"),
                *rate("tandem_router_resumes_total", "job"),
                *rate("tandem_router_broken_streams_total", "job"))),
            Panel("Way of the state", "reqps", rate("tandem_router_path_total", "path"),
                  "handoff is the rule; recompute: a prompt was computed twice; local: no prefill node was up."),
            Panel("Transfers open, stranded", "short", (
                ("sum(tandem_router_transfers_open)", "open"), ("sum(tandem_router_transfers_stranded)", "stranded"))),
            Panel("Nodes", "short", (("sum by (role, state) (tandem_router_nodes)", "{{role}} {{state}}"),)),
        ),
    ),
    (
        "Hand-off",
        (
            Panel("Exposed hand-off", "s", quantiles("tandem_handoff_exposed_seconds"),
                  "After prefill was ready: what the hand-off adds to the time to first token."),
            Panel("Hand-off, first to last read", "s", quantiles("tandem_handoff_seconds")),
            Panel("Wait for prefill", "s", quantiles("tandem_handoff_wait_seconds")),
            Panel("Bytes received", "Bps", rate("tandem_handoff_bytes_total", "instance")),
            Panel("Transfers", "ops", (
                ("sum(rate(tandem_transfers_sent_total[$__rate_interval]))", "sent"),
                ("sum(rate(tandem_transfers_received_total[$__rate_interval]))", "received"),
                ("sum(rate(tandem_transfers_failed_total[$__rate_interval]))", "failed"))),
            Panel("Pages in quarantine", "short", per_rank("tandem_pages_quarantined")),
        ),
    ),
    (
        "Ranks",
        (
            Panel("Requests running", "short", per_rank("tandem_num_requests_running")),
            Panel("Requests waiting", "short", per_rank("tandem_num_requests_waiting")),
            Panel("States held, being received", "short", (
                ("tandem_num_requests_held", "held {{instance}} rank {{engine}}"),
                ("tandem_num_requests_receiving", "receiving {{instance}} rank {{engine}}"))),
            Panel("Pages in use", "percentunit", per_rank("tandem_kv_cache_usage_perc")),
            Panel("Slots free", "short", per_rank("tandem_slots_free")),
            Panel("Prompt tokens queued", "short", per_rank("tandem_queued_prompt_tokens")),
            Panel("Prompt tokens", "short", rate("tandem_prompt_tokens_total", "job")),
            Panel("Generated tokens", "short", rate("tandem_generation_tokens_total", "job")),
            Panel("Preempted, recomputed", "ops", (
                ("sum by (job) (rate(tandem_num_preemptions_total[$__rate_interval]))", "preempted {{job}}"),
                ("sum by (job) (rate(tandem_requests_recomputed_total[$__rate_interval]))", "recomputed {{job}}"))),
            Panel("Steps", "ops", rate("tandem_engine_steps_total", "job, instance, engine")),
        ),
    ),
)  # fmt: skip


def render() -> str:
    """The dashboard as Grafana's JSON."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        panels.append({"type": "row", "title": title, "gridPos": {"x": 0, "y": y, "w": _COLUMNS, "h": 1}})
        y += 1
        for index, panel in enumerate(row):
            x, line = index % 3 * 8, index // 3
            panels.append(_graph(panel, {"x": x, "y": y + line * _HEIGHT, "w": 8, "h": _HEIGHT}))
        y += -(-len(row) // 3) * _HEIGHT
    for number, shown in enumerate(panels, start=1):
        shown["id"] = number
    dashboard = {
        "uid": "tandem",
        "title": "Tandem",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]},
        "panels": panels,
    }
    return json.dumps(dashboard, indent=1) + "\n"


def _graph(panel: Panel, position: dict[str, int]) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": _DATASOURCE,
        "gridPos": position,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": _DATASOURCE, "expr": query, "legendFormat": legend.strip()}
            for index, (query, legend) in enumerate(panel.queries)
        ],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.dashboard", description="Write the Grafana dashboard.")
    parser.add_argument("--check", action="store_true", help="only say whether the file is up to date")
    if parser.parse_args(arguments).check:
        if not DASHBOARD.exists() or DASHBOARD.read_text() != render():
            raise SystemExit(f"{DASHBOARD.name} is out of date: run python -m tools.dashboard")
        return
    DASHBOARD.write_text(render())


if __name__ == "__main__":
    main()
