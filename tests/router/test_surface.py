"""The routes of the router that are not about generating, and what bad requests get."""

import asyncio
import json
import socket
import subprocess
import sys
import time

import aiohttp
import pytest

from tests.router.harness import cluster, pairs_of, settings
from tests.router.stand_in_nodes import Fault


async def get(it, path):
    async with it.client.get(f"{it.url}{path}") as response:
        return response.status, await response.read()


async def test_readiness_names_what_is_missing():
    async with cluster(pairs_of(1, 0)) as it:
        status, body = await get(it, "/readiness")
        report = json.loads(body)
        assert status == 503
        assert report["prefill"] == {"healthy": 1, "total": 1}
        assert report["decode"] == {"healthy": 0, "total": 0}
        assert "no pair" in report["reason"]
        assert (await get(it, "/liveness"))[0] == 200


async def test_readiness_is_200_with_a_pair():
    async with cluster(pairs_of(1, 1)) as it:
        assert (await get(it, "/readiness"))[0] == 200


async def test_workers_tells_what_is_known_of_each_rank():
    async with cluster(pairs_of(1, 1, ranks=2)) as it:
        it.decodes[0].queued_tokens[1] = 77
        it.decodes[0].membership.beat_now()
        await it.until(lambda: it.service.registry.get("d0").targets[1].load.queued_prompt_tokens == 77)
        status, body = await get(it, "/workers")
        report = json.loads(body)
        assert (status, report["total"], report["prefill_workers"]) == (200, 2, 1)
        decode = next(worker for worker in report["workers"] if worker["id"] == "d0")
        assert decode["state"] == "ready"
        assert decode["ranks"][1]["epoch"] == it.decodes[0].states[1].epoch
        assert decode["ranks"][1]["load"]["queued_prompt_tokens"] == 77


async def test_metrics_are_there_and_nothing_is_stranded():
    async with cluster(pairs_of(1, 1)) as it:
        await it.complete()
        await it.stream()
        text = (await get(it, "/metrics"))[1].decode()
        for line in (
            'tandem_router_requests_total{path="/v1/completions",status="200"} 2.0',
            'tandem_router_path_total{path="handoff"} 2.0',
            "tandem_router_transfers_finished_total 2.0",
            "tandem_router_transfers_stranded 0.0",
            'tandem_router_nodes{role="decode",state="ready"} 1.0',
            "tandem_router_time_to_first_token_seconds_count 1.0",
        ):
            assert line in text, line


async def test_models_come_from_any_healthy_node_and_are_remembered():
    async with cluster(pairs_of(1, 1)) as it:
        await it.decodes[0].refuse()
        status, body = await get(it, "/v1/models")
        assert (status, json.loads(body)["data"][0]["id"]) == (200, "stand-in")
        await it.prefills[0].refuse()
        assert (await get(it, "/v1/models"))[0] == 200


async def test_tokenize_is_passed_to_one_node_and_its_errors_too():
    async with cluster(pairs_of(1, 1)) as it:
        async with it.client.post(f"{it.url}/tokenize", json={"prompt": "a b c"}) as response:
            assert (await response.json())["count"] == 3
        async with it.client.get(f"{it.url}/v1/responses/none") as response:
            assert response.status == 404


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"{", "JSON"),
        (b"", "JSON"),
        (b"[]", "object"),
        (b'"x"', "object"),
        (b'{"a": NaN}', "NaN"),
        (b"\xff", "JSON"),
    ],
)
async def test_a_body_that_is_no_json_object_is_400_and_reaches_no_node(body, word):
    async with cluster(pairs_of(1, 1)) as it:
        async with it.client.post(
            f"{it.url}/v1/completions", data=body, headers={"Content-Type": "application/json"}
        ) as response:
            answer = await response.json()
            assert response.status == 400
            assert word in answer["error"]["message"]
        assert not it.prefills[0].seen
        assert (await it.complete())[0] == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/responses/input_tokens"])
async def test_a_body_that_says_it_is_no_json_is_415(path):
    async with cluster(pairs_of(1, 1)) as it:
        for kind in ("text/plain", "application/x-www-form-urlencoded"):
            async with it.client.post(f"{it.url}{path}", data=b"{}", headers={"Content-Type": kind}) as response:
                assert response.status == 415
                assert (await response.json())["error"]["type"] == "UnsupportedMediaTypeError"
        assert not it.prefills[0].seen


async def test_head_is_answered_like_get_without_the_body():
    async with cluster(pairs_of(1, 1)) as it, it.client.head(f"{it.url}/v1/models") as response:
        assert response.status == 200
        assert await response.read() == b""


@pytest.mark.parametrize("digits", [400, 5000])
async def test_an_integer_beyond_all_bounds_is_refused_by_name(digits):
    async with cluster(pairs_of(1, 1)) as it:
        body = b'{"prompt": "a", "max_tokens": %b}' % (b"9" * digits)
        headers = {"Content-Type": "application/json"}
        async with it.client.post(f"{it.url}/v1/completions", data=body, headers=headers) as response:
            assert response.status == 400
            assert (await response.json())["error"]["param"] == "max_tokens"


async def test_a_body_over_the_limit_is_413_and_the_router_stays_well():
    async with cluster(pairs_of(1, 1), settings(server={"max_payload_bytes": 1000})) as it:
        assert (await it.complete(prompt="x" * 2000))[0] == 413
        assert (await it.complete())[0] == 200


async def test_too_many_choices_are_refused_before_any_work():
    async with cluster(pairs_of(1, 1)) as it:
        status, body = await it.complete(n=10**9)
        assert (status, body["error"]["param"]) == (400, "n")
        assert not it.prefills[0].seen


async def test_over_the_concurrency_limit_is_503_with_retry_after():
    async with cluster(pairs_of(1, 1), settings(server={"max_concurrent_requests": 1})) as it:
        it.decodes[0].faults.append(Fault.HANG)
        first = asyncio.create_task(it.complete())
        await it.until(lambda: it.decodes[0].seen)
        async with it.client.post(f"{it.url}/v1/completions", json={"prompt": "a"}) as response:
            assert response.status == 503
            assert "Retry-After" in response.headers
        first.cancel()
        await it.settle()
        assert (await it.complete())[0] == 200


async def test_a_clients_own_kv_transfer_params_are_stripped():
    async with cluster(pairs_of(1, 1)) as it:
        status, _ = await it.complete(kv_transfer_params={"do_remote_prefill": True, "transfer_id": "mine"})
        assert status == 200
        for node in it.nodes:
            assert node.seen[0][1]["kv_transfer_params"]["transfer_id"] != "mine"


async def test_ids_credentials_and_traces_are_forwarded_to_both_nodes():
    async with cluster(pairs_of(1, 1)) as it:
        headers = {"X-Request-Id": "mine-1", "Authorization": "Bearer k", "traceparent": "00-1-2-3", "X-Other": "no"}
        async with it.client.post(f"{it.url}/v1/completions", json={"prompt": "a"}, headers=headers) as response:
            assert response.headers["X-Request-Id"] == "mine-1"
            assert response.headers["X-Node"] == "d0"
        for node in it.nodes:
            seen = node.seen[0][0]
            assert seen["x-request-id"] == "mine-1"
            assert seen["authorization"] == "Bearer k"
            assert seen["traceparent"] == "00-1-2-3"
            assert "x-other" not in seen


async def test_the_configured_key_is_sent_where_the_client_has_none():
    async with cluster(pairs_of(1, 1), settings(node_api_key="secret")) as it:
        await it.complete()
        assert all(node.seen[0][0]["authorization"] == "Bearer secret" for node in it.nodes)


async def test_unknown_paths_and_methods_get_openai_shaped_errors():
    async with cluster(pairs_of(1, 1)) as it:
        status, body = await get(it, "/nowhere")
        assert (status, json.loads(body)["error"]["code"]) == (404, 404)
        assert (await get(it, "/v1/completions"))[0] == 405


async def test_messages_errors_have_anthropics_shape():
    async with cluster(pairs_of(0, 0)) as it, it.client.post(f"{it.url}/v1/messages", json={}) as response:
        assert response.status == 503
        assert (await response.json())["error"]["type"] == "overloaded_error"


async def test_browsers_may_ask_from_allowed_origins():
    async with cluster(pairs_of(1, 1), settings(server={"cors_allowed_origins": ["https://a.example"]})) as it:
        headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        async with it.client.options(f"{it.url}/v1/completions", headers=headers) as response:
            assert response.headers["Access-Control-Allow-Origin"] == "https://a.example"
        for origin, allowed in (("https://a.example", True), ("https://b.example", False)):
            async with it.client.post(
                f"{it.url}/v1/completions", json={"prompt": "a"}, headers={"Origin": origin}
            ) as response:
                assert ("Access-Control-Allow-Origin" in response.headers) is allowed


async def test_a_slow_reader_does_not_break_its_stream():
    deadlines = {"idle_gap_s": 0.3}
    async with cluster(pairs_of(1, 1), settings(deadlines=deadlines)) as it:
        connector = aiohttp.TCPConnector()
        async with (
            aiohttp.ClientSession(connector=connector, read_bufsize=1024) as client,
            client.post(
                f"{it.url}/v1/completions", json={"prompt": "a", "stream": True, "max_tokens": 60_000}
            ) as response,
        ):
            await response.content.readany()
            await asyncio.sleep(1.0)
            data = await response.read()
        assert data.endswith(b"data: [DONE]\n\n")
        assert b'"error"' not in data
        await it.settle()


def test_help_and_check_need_no_heavy_imports_and_start_fast():
    code = (
        "import sys; from router.__main__ import main; import router.service; status = main(['--check']); "
        "heavy = {'torch', 'triton', 'transformers', 'model', 'engine', 'kernels', 'kv_transfer', 'mooncake'}; "
        "loaded = heavy & set(sys.modules); assert not loaded, loaded; sys.exit(status)"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert "max_attempts: 3" in done.stdout
    assert time.monotonic() - started < 5.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "server.prot=1"], ["server", "prot"]),
        (["--set", "server.port=70000"], ["server.port=70000"]),
        (["--set", "requests.prefill_policy=best"], ["prefill_policy"]),
        (["--prefill", "10.0.0.1:8000"], ["10.0.0.1:8000"]),
        (["--prefill", "http://a:1", "x"], ["bootstrap"]),
        (["--set", "cluster.port=null"], ["nobody could serve"]),
    ],
)
def test_a_wrong_configuration_is_named_and_ends_with_2(arguments, words, capsys):
    from router.__main__ import main

    assert main(["--check", *arguments]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


def test_the_process_serves_and_ends_on_sigterm(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "router", "--port", "0", "--set", "cluster.port=0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "http on 127.0.0.1:" in line, line
        process.terminate()
        assert process.wait(timeout=10) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize("key", ["server", "cluster"])
def test_a_port_that_is_taken_is_named_and_ends_with_2(key):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = {"server": 0, "cluster": 0, key: port}
        command = [sys.executable, "-m", "router"]
        for name, value in ports.items():
            command += ["--set", f"{name}.port={value}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2, done.stderr
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
