from pathlib import Path

import msgspec
import pytest

from runtime import config
from runtime.errors import ConfigError


class Inner(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    size: int = 4

    def __post_init__(self) -> None:
        if self.size <= 0:
            raise ValueError(f"size={self.size}: must be positive")


class Outer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    inner: Inner = Inner()
    rates: tuple[float, ...] = ()


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    return path


def test_a_file_with_overrides_on_top(tmp_path: Path) -> None:
    path = written(tmp_path, "name: x\ninner: {size: 2}\n")
    loaded = config.load(path, Outer, ["inner.size=9", "rates=[1, 2.5]"])
    assert loaded == Outer(name="x", inner=Inner(size=9), rates=(1.0, 2.5))


def test_what_is_printed_can_be_read_back(tmp_path: Path) -> None:
    loaded = config.load(None, Outer, ["name=y"])
    assert config.load(written(tmp_path, config.dump(loaded)), Outer) == loaded


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: x\ninner: {sise: 2}\n", "`sise` - at `$.inner`"),
        ("name: x\ninner: {size: two}\n", "$.inner.size"),
        ("name: x\ninner: {size: 0}\n", "size=0: must be positive"),
        ("inner: {}\n", "`name`"),
        ("name: x\nname: y\n", "line 2: key `name` is given twice"),
        ("- 1\n", "expected a mapping"),
        ("a: [", "not YAML"),
        ("name: 3\n", "$.name"),
    ],
)
def test_a_wrong_file_is_told_with_its_path(tmp_path: Path, text: str, told: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        config.load(path, Outer)
    assert told in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("override", ["name", "=x", "name.deeper=1"])
def test_a_wrong_override_is_told(override: str) -> None:
    with pytest.raises(ConfigError, match=r"--set|command line"):
        config.load(None, Outer, ["name=x", override])


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*missing\.yaml"):
        config.load(tmp_path / "missing.yaml", Outer)
