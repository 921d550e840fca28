"""The reference page says what the structures say."""

from typing import Literal

import msgspec
import pytest

from tools.config_reference import REFERENCE, field_docs, main, render, sections


class Inner(msgspec.Struct, frozen=True, kw_only=True):
    size: int | Literal["auto"] = "auto"
    """Bytes,
    or auto."""
    pair: tuple[int, int] = (1, 2)


class Base(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    wait_s: float = 5.0
    """How long."""
    inner: Inner = Inner()
    maybe: Inner | None = None
    """Off unless given."""
    many: tuple[Inner, ...] = ()


class Derived(Base, frozen=True, kw_only=True):
    wait_s: float = 7.5
    """How long here."""


def test_every_key_has_its_type_default_and_docstring() -> None:
    tables = dict(sections(Base))
    assert tables[""] == [
        ("`name`", "text", "", ""),
        ("`wait_s`", "number", "`5`", "How long."),
        ("`maybe`", "section or null", "`null`", "Off unless given."),
        ("`many`", "list of section", "`[]`", ""),
    ]
    assert tables["inner"] == [
        ("`inner.size`", "int or `auto`", '`"auto"`', "Bytes, or auto."),
        ("`inner.pair`", "[int, int]", "`[1, 2]`", ""),
    ]
    assert set(tables) == {"", "inner", "maybe", "many[]"}


def test_a_subclass_speaks_for_its_own_fields() -> None:
    assert field_docs(Derived) == {"wait_s": "How long here.", "maybe": "Off unless given."}


def test_the_page_in_docs_is_up_to_date() -> None:
    assert REFERENCE.read_text() == render(), "run python -m tools.config_reference"


def test_the_check_fails_on_a_page_that_differs(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    page = type(REFERENCE)(str(tmp_path)) / "config-reference.md"
    monkeypatch.setattr("tools.config_reference.REFERENCE", page)
    with pytest.raises(SystemExit, match="out of date"):
        main(["--check"])
    main([])
    main(["--check"])
    page.write_text(page.read_text() + "\n")
    with pytest.raises(SystemExit, match="out of date"):
        main(["--check"])
