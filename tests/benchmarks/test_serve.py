import importlib.util
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "serve.py"
spec = importlib.util.spec_from_file_location("benchmark_serve", PATH)
benchmark = importlib.util.module_from_spec(spec)
sys.modules["benchmark_serve"] = benchmark  # dataclasses look their module up
spec.loader.exec_module(benchmark)

FIRST_S, GAP_S = 0.05, 0.005
TEMPLATE_TOKENS = 4


class Endpoint(BaseHTTPRequestHandler):
    """An endpoint with known times: FIRST_S to the first token, GAP_S from one to the next."""

    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(request)
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            self.answer(request)
        finally:
            with server.lock:
                server.now -= 1

    def answer(self, request):
        if self.server.failure == "status":
            self.send_error(503, "no engine")
            return
        self.send_response(200)
        self.end_headers()
        chat = "messages" in request
        num_prompt = (
            TEMPLATE_TOKENS + 2 * len(request["messages"][0]["content"].split())
            if chat
            else len(request["prompt"])
        )
        time.sleep(FIRST_S)
        if chat:
            self.send({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for i in range(request["max_tokens"]):
            if i:
                time.sleep(GAP_S)
            self.send({"choices": [{"delta": {"content": "x"}} if chat else {"text": "x"}]})
            if self.server.failure == "cut" and request["max_tokens"] > benchmark.WARM_UP_TOKENS:
                return
        self.send({"choices": [{"delta": {}} if chat else {"text": ""}]})
        if self.server.counts:
            self.send(
                {
                    "choices": [],
                    "usage": {"prompt_tokens": num_prompt, "completion_tokens": request["max_tokens"]},
                }
            )
        self.wfile.write(b"data: [DONE]\n\n")

    def send(self, chunk):
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.daemon_threads = True
    server.requests, server.now, server.most, server.lock = [], 0, 0, threading.Lock()
    server.failure, server.counts = None, True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run(server, tmp_path, *arguments):
    file = tmp_path / "out.json"
    url = f"http://127.0.0.1:{server.server_port}/"
    common = [
        "--url",
        url,
        "--model",
        "m",
        "--output-tokens",
        "12",
        "--concurrency",
        "1",
        "4",
        "--json",
        str(file),
    ]
    code = benchmark.main([*common, "--requests-per-slot", "2", *arguments])
    return code, json.loads(file.read_text()) if file.exists() else None


@pytest.mark.parametrize(
    "api", [["--api", "chat"], ["--api", "completions", "--vocab", "512"]], ids=["chat", "raw"]
)
def test_measures_what_was_put_in(server, tmp_path, capsys, api):
    code, result = run(server, tmp_path, "--prompt-tokens", "64", *api)
    assert code == 0
    one, four = result["levels"]
    assert (one["concurrency"], one["requests"], one["failed"]) == (1, 2, 0)
    assert (four["concurrency"], four["requests"], four["failed"]) == (4, 8, 0)
    assert one["prompt_tokens"] == pytest.approx(64, abs=1)
    assert one["output_tokens"] == 12
    # Nothing can be faster than the server waits; how much slower depends on what else the machine does.
    assert FIRST_S * 1e3 <= one["ttft_ms"]["median"] < 10 * FIRST_S * 1e3
    assert GAP_S * 1e3 * 0.9 <= one["inter_token_ms"]["median"] < 10 * GAP_S * 1e3
    assert GAP_S * 1e3 * 0.9 <= one["ms_per_token"]["median"] < 10 * GAP_S * 1e3
    assert one["output_tokens_per_s"] < 12 / (FIRST_S + 11 * GAP_S)
    assert four["output_tokens_per_s"] > one["output_tokens_per_s"]
    assert server.most == 4
    assert "| 4 | 8 (0) |" in capsys.readouterr().out


def test_requests_are_alike_in_length_and_differ_in_their_beginning(server, tmp_path):
    run(server, tmp_path, "--api", "completions", "--vocab", "512", "--prompt-tokens", "20", "--rounds", "2")
    assert len({tuple(request["prompt"][:4]) for request in server.requests}) == len(server.requests)
    assert {len(request["prompt"]) for request in server.requests} == {20}
    assert all(3 <= token < 480 for request in server.requests for token in request["prompt"])
    assert all(request["ignore_eos"] and request["temperature"] == 0 for request in server.requests)
    timed = [request for request in server.requests if request["max_tokens"] == 12]
    assert len(timed) == 2 * (2 + 8)


def test_without_usage_chunks_are_counted(server, tmp_path):
    server.counts = False
    code, result = run(server, tmp_path, "--api", "completions", "--vocab", "512")
    assert code == 0
    assert result["levels"][0]["output_tokens"] == 12
    assert run(server, tmp_path)[0] == 1


@pytest.mark.parametrize("api", [[], ["--api", "completions", "--vocab", "512"]], ids=["chat", "raw"])
def test_an_endpoint_that_does_not_answer_is_said_so(server, tmp_path, capsys, api):
    server.failure = "status"
    assert run(server, tmp_path, *api) == (1, None)
    assert "503" in capsys.readouterr().err


def test_streams_that_end_early_are_failures(server, tmp_path, capsys):
    server.failure = "cut"
    code, result = run(server, tmp_path)
    assert code == 1
    assert result["levels"][1]["failed"] == 8
    assert result["levels"][1]["ttft_ms"] == {"median": None, "p99": None}
    assert "ended early" in capsys.readouterr().err


def test_nobody_there(tmp_path, capsys):
    assert benchmark.main(["--url", "http://127.0.0.1:1", "--model", "m"]) == 1
    assert "does not answer" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--api", "completions"], ["--concurrency", "0"], ["--rounds", "0"]])
def test_impossible_options(arguments):
    with pytest.raises(SystemExit):
        benchmark.parse(["--url", "http://x", "--model", "m", *arguments])


def test_p99_is_a_value_that_was_measured():
    assert benchmark._median_and_p99([i / 1e3 for i in range(1, 101)]) == {"median": 50.5, "p99": 99.0}
    assert benchmark._median_and_p99([0.002]) == {"median": 2.0, "p99": 2.0}
