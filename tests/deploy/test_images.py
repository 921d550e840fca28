"""The images install what the requirements pin and start what exists."""

import re
import shlex
from pathlib import Path

import pytest

from tests.deploy.shipped import DEPLOY, ROOT

IMAGES = sorted((DEPLOY / "images").iterdir())


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) with comments dropped and continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest) for line in joined.splitlines() if line for word, _, rest in [line.partition(" ")]]


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_everything_copied_or_installed_is_in_the_repository(path: Path) -> None:
    found = instructions(path)
    assert found[0][0] == "ARG"
    assert found[1] == ("FROM", "${" + found[0][1].split("=")[0] + "}")
    home = next(rest for word, rest in found if word == "WORKDIR")
    for word, rest in found:
        if word == "COPY":
            source, target = rest.split()
            assert (ROOT / source).exists()
            assert target.startswith(home)
        if word == "RUN" and "pip install" in rest:
            requirements = Path(shlex.split(rest)[-1]).relative_to(home)
            assert (ROOT / requirements).is_file()
            assert {"-r"} < set(shlex.split(rest))
            assert requirements.stem == {"cuda13": "gpu", "cpu": "cpu"}[path.suffix[1:]]


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_the_process_is_number_one_unprivileged_and_stopped_with_sigterm(path: Path) -> None:
    found = dict(instructions(path))
    assert found["ENTRYPOINT"] == '["python", "-m"]'
    assert found["STOPSIGNAL"] == "SIGTERM"
    # A number, and not root's: Kubernetes cannot tell what a name means.
    assert int(found["USER"]) > 0


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_the_libraries_the_transfer_engine_loads_are_installed(path: Path) -> None:
    packages = " ".join(rest for word, rest in instructions(path) if word == "RUN")
    wanted = re.findall(r"^need \S+ (\S+)$", (DEPLOY / "system-libraries.sh").read_text(), re.MULTILINE)
    assert wanted
    for package in wanted:
        assert package in packages.split(), package


def test_what_is_not_source_stays_out_of_the_build() -> None:
    ignored = (ROOT / ".containerignore").read_text().split()
    assert {".git", ".venv", ".cache"} <= set(ignored)
