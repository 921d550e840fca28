"""What bodies of the three chat APIs become: odd orders, arguments, parts and choices."""

import json
from pathlib import Path
from typing import Any

import pytest

from api.settings import ApiSettings

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "further-requests.json").read_text())["vectors"]
PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}


@pytest.mark.parametrize("api", PATHS)
async def test_prompts(serve: Any, api: str) -> None:
    server = await serve(ApiSettings(reasoning_effort_profile="0731"))
    vectors = [vector for vector in VECTORS if vector["name"].startswith(f"{api}/")]
    assert len(vectors) > 10
    for vector in vectors:
        answer = await server.post_json(PATHS[api], {"max_tokens": 9, **vector["input"]})
        submit = server.engine.submitted.pop()
        prompt = server.engine.tokenizer.decode(submit.prompt_ids, skip_special=False)
        assert prompt == vector["expected"]["prompt"], (vector["name"], answer)
