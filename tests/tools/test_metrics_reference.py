"""The metrics page says what nodes and routers export."""

from pathlib import Path

import pytest

from tools.metrics_reference import REFERENCE, main, node_families, render, router_families, series


def test_the_page_in_docs_is_up_to_date() -> None:
    assert REFERENCE.read_text() == render(), "run python -m tools.metrics_reference"


def test_every_series_is_explained() -> None:
    families = [*node_families(), *router_families()]
    assert len(families) > 40
    for family in families:
        assert family.documentation, family.name
    names = [name for family in families for name in series(family)]
    assert len(set(names)) == len(names)
    assert {"tandem_handoff_seconds_bucket", "tandem_prompt_tokens_total", "tandem_router_healthy"} <= set(names)


def test_the_check_fails_on_a_page_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "metrics.md"
    monkeypatch.setattr("tools.metrics_reference.REFERENCE", page)
    with pytest.raises(SystemExit, match="out of date"):
        main(["--check"])
    main([])
    main(["--check"])
