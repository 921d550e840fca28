"""Health, models, version, metrics, request ids, keys and CORS."""

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest

from api.auth import ApiKeys
from api.settings import ApiSettings
from runtime.errors import ConfigError
from tests.api.http.conftest import Server, samples

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


async def test_the_probes_answer(server: Server) -> None:
    for path in ("/health", "/ping"):
        response = await server.get(path)
        assert (response.status, await response.read()) == (200, b"")
    assert (await server.post("/ping", None)).status == 200
    assert re.fullmatch(r"\d+\.\d+\.\d+", (await (await server.get("/version")).json())["version"])
    assert await (await server.get("/load")).json() == {"server_load": 0}


async def test_models_are_listed_under_every_name(serve: Any) -> None:
    server = await serve(ApiSettings(served_model_name=("flash", "org/deepseek")))
    listed = await (await server.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["flash", "org/deepseek"]
    assert all(card["max_model_len"] == 4096 and card["root"] == "tiny" for card in listed["data"])
    for name in ("flash", "org/deepseek"):
        assert (await (await server.get(f"/v1/models/{name}")).json())["id"] == name
        assert (await server.post_json(CHAT, {"model": name, "messages": HI, "max_tokens": 1}))["model"] == name
    missing = await server.get("/v1/models/other")
    assert missing.status == 404
    assert (await missing.json())["error"]["param"] == "model"
    assert (await server.post_json(CHAT, {"messages": HI, "max_tokens": 1}))["model"] == "flash"


async def test_every_response_carries_the_request_id(server: Server) -> None:
    body = {"messages": HI, "max_tokens": 1}
    given = "___prefill_addr_a:1___decode_addr_b:2_0a"
    for stream in (False, True):
        response = await server.post(CHAT, {**body, "stream": stream}, headers={"X-Request-Id": given})
        assert response.headers["X-Request-Id"] == given
        assert f"chatcmpl-{given}" in await response.text()
    response = await server.post(CHAT, {"messages": []}, headers={"X-Request-Id": "abc"})
    assert response.headers["X-Request-Id"] == "abc"
    first, second = [(await server.post(CHAT, body)).headers["X-Request-Id"] for _ in range(2)]
    assert first != second
    strange = await server.post(CHAT, body, headers={"X-Request-Id": "a b" * 200})
    assert re.fullmatch(r"[0-9a-f]{32}", strange.headers["X-Request-Id"])
    named = await server.post_json(CHAT, {**body, "request_id": "mine"})
    assert named["id"] == "chatcmpl-mine"


async def test_two_live_requests_may_carry_one_id(serve: Any) -> None:
    server = await serve(step_s=0.02)
    import asyncio

    body = {"messages": HI, "max_tokens": 3, "request_id": "same"}
    answers = await asyncio.gather(*(server.post_json(CHAT, body) for _ in range(5)))
    assert {answer["id"] for answer in answers} == {"chatcmpl-same"}
    assert len({submit.request_id for submit in server.engine.submitted}) == 5


async def test_every_rank_has_its_series_from_the_first_scrape_on(serve: Any) -> None:
    server = await serve(num_ranks=2)
    values = await samples(server)
    for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total",
        "generation_tokens_total", "num_preemptions_total", "prefix_cache_queries_total", "prefix_cache_hits_total",
        "time_to_first_token_seconds_count", "inter_token_latency_seconds_count", "e2e_request_latency_seconds_count",
        "request_time_per_output_token_seconds_count", "request_prompt_tokens_count", "request_success_totalstop",
        "request_generation_tokens_count", "request_params_n_count", "request_params_max_tokens_count",
    ):  # fmt: skip
        for prefix in ("vllm:", "tandem_"):
            for rank in ("0", "1"):
                assert (prefix + name, rank) in values, (prefix + name, rank)
    assert values["vllm:kv_cache_usage_perc", "0"] == pytest.approx(0.25)


async def test_requests_are_counted_and_timed(server: Server) -> None:
    server.engine.cached_tokens = 1
    await server.post_json(COMPLETIONS, {"prompt": [5, 6, 7], "max_tokens": 5, "n": 2, "seed": 1})
    values = await samples(server)
    assert values["vllm:request_success_totallength", "0"] == 2
    assert values["vllm:time_to_first_token_seconds_count", "0"] == 2
    assert values["vllm:inter_token_latency_seconds_count", "0"] == 8
    assert values["vllm:inter_token_latency_seconds_bucket+Inf", "0"] == 8
    assert values["vllm:request_generation_tokens_sum", "0"] == 10
    assert values["vllm:request_prompt_tokens_sum", "0"] == 6
    assert values["vllm:prefix_cache_hits_total", "0"] == 2
    assert values["vllm:request_params_n_sum", "0"] == 2
    assert values["tandem_generation_tokens_total", "0"] == 10
    for name in ("request_queue_time", "request_prefill_time", "request_inference_time"):
        assert values[f"vllm:{name}_seconds_count", "0"] == 0, "the stand-in engine measures nothing"
    assert values["vllm:iteration_tokens_total_bucket+Inf", "0"] == 0
    text = await (await server.get("/metrics")).text()
    info = 'vllm:cache_config_info{block_size="256",engine="0",model_name="tiny",num_gpu_blocks="100"} 1.0'
    assert info in text
    assert f'tandem_http_requests_total{{handler="{COMPLETIONS}",method="POST",status="200"}} 1.0' in text


async def test_a_request_is_counted_for_the_rank_that_computed_it(serve: Any) -> None:
    server = await serve(num_ranks=2)
    headers = {"x-data-parallel-rank": "1"}
    await server.post_json(COMPLETIONS, {"prompt": "a", "max_tokens": 2}, headers=headers)
    values = await samples(server)
    assert values["vllm:request_success_totallength", "1"] == 1
    assert values["vllm:request_success_totallength", "0"] == 0
    assert values["vllm:time_to_first_token_seconds_count", "1"] == 1


async def test_keys_guard_all_but_probes(serve: Any, tmp_path: Path) -> None:
    hashed = "sha256:" + hashlib.sha256(b"second").hexdigest()
    file = tmp_path / "keys"
    file.write_text("# operators\nthird  # Ann\n\n")
    server = await serve(ApiSettings(api_keys=("first", hashed), api_keys_file=str(file)))
    body = {"messages": HI, "max_tokens": 1}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer"}, {"Authorization": "first"},
                    {"Authorization": f"Bearer {hashed}"}, {"x-api-key": "first"}):  # fmt: skip
        response = await server.post(CHAT, body, headers=headers)
        assert response.status == 401, headers
        assert (await response.json())["error"]["type"] == "AuthenticationError"
    for key in ("first", "second", "third"):
        assert (await server.post(CHAT, body, headers={"Authorization": f"Bearer {key}"})).status == 200
        assert (await server.post(CHAT, body, headers={"Authorization": f"bearer {key}"})).status == 200
    assert (await server.get("/v1/models")).status == 401
    for path in ("/health", "/metrics", "/version", "/ping", "/load"):
        assert (await server.get(path)).status == 200


def test_keys_that_cannot_work_are_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="64 hex digits"):
        ApiKeys(("sha256:abc",))
    with pytest.raises(ConfigError, match="cannot read"):
        ApiKeys.from_settings(ApiSettings(api_keys_file=str(tmp_path / "none")))
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(ConfigError, match="no key"):
        ApiKeys.from_settings(ApiSettings(api_keys_file=str(tmp_path / "empty")))


async def test_browsers_of_allowed_origins_may_call(serve: Any) -> None:
    server = await serve(ApiSettings(cors_allow_origins=("https://a.example",), api_keys=("k",)))
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST",
                 "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
    response = await server.session.options(server.base_url + CHAT, headers=preflight)
    assert response.status == 204
    assert response.headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert "POST" in response.headers["Access-Control-Allow-Methods"]
    assert response.headers["Access-Control-Allow-Headers"] == "authorization,content-type"
    allowed = {"Origin": "https://a.example", "Authorization": "Bearer k"}
    for stream in (False, True):
        body = {"messages": HI, "max_tokens": 1, "stream": stream}
        response = await server.post(CHAT, body, headers=allowed)
        assert response.headers["Access-Control-Allow-Origin"] == "https://a.example"
    other = await server.post(CHAT, {}, headers={**allowed, "Origin": "https://b.example"})
    assert "Access-Control-Allow-Origin" not in other.headers


@pytest.mark.parametrize(
    "wrong",
    [{"max_body_bytes": 0}, {"keepalive_s": 0}, {"default_max_tokens": 0}, {"max_logprobs": -2},
     {"reasoning_fields": ()}, {"response_store_bytes": -1}],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ApiSettings(**wrong)
