"""`r1-cluster chat`, and text that no terminal should have to do with: one sentence each, never a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripted_server import ANSWER, THOUGHT, ScriptedServer

from r1_cluster.cli.main import main

R1_CLUSTER = Path(sys.executable).with_name("r1-cluster")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ScriptedServer(tmp_path_factory.mktemp("scripted")) as server:
        yield server


def run(*arguments, stdin=b"", **environment):
    return subprocess.run(
        [R1_CLUSTER, *arguments],
        input=stdin,
        capture_output=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def chat(server, *arguments, **options):
    return run("chat", "--url", server.url.removesuffix("/v1"), *arguments, **options)


def sentence(result):
    """What a command says that fails; checks that it is one line, in UTF-8."""
    assert result.returncode == 2
    assert result.stdout == b""
    (line,) = result.stderr.decode().splitlines()
    assert line.startswith("r1-cluster: ")
    return line


@pytest.mark.slow
def test_one_question(server):
    result = chat(server, "What", "is", "it?", "--seed", "1", "--temperature", "0.5")
    assert result.stdout.decode() == f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}\n"
    body = server.bodies[-1]
    assert (body["messages"], body["seed"], body["temperature"]) == (
        [{"role": "user", "content": "What is it?"}],
        1,
        0.5,
    )


@pytest.mark.slow
def test_a_conversation(server):
    result = chat(server, stdin="Hi 世界\nmore\n\n".encode())
    assert result.returncode == 0
    assert result.stdout.decode().count(ANSWER) == 2
    assert [message["content"] for message in server.bodies[-1]["messages"]] == ["Hi 世界", ANSWER, "more"]


@pytest.mark.slow
def test_a_message_of_bytes_that_are_no_text(server):
    for message in (b"a\xff", b"\xed\xa0\x80", b"\xe4\xb8"):
        assert "is not valid UTF-8" in sentence(chat(server, message))


@pytest.mark.parametrize(
    "arguments",
    [
        ["chat", "a\udcff"],
        ["chat", "--model", "\udcff", "hello"],
        ["chat", "--url", "http://\udcff", "hello"],
        ["chat", "--service", "\udcff"],
        ["status", "--service", "\udcff"],
        ["drain", "--service", "\udcff"],
        ["stop", "--service", "\udcff"],
        ["serve", "\udcff.yaml"],
        ["serve", "x.yaml", "--address", "\udcff"],
        ["\udcff"],
        ["chat", "\udcff" * 1000],
    ],
    ids=ascii,
)
def test_arguments_that_are_no_text(arguments, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("r1-cluster: the argument '")
    assert line.endswith("' is not valid UTF-8")
    assert len(line) < 200


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8:strict", "ascii"])
def test_lines_that_are_no_text_are_asked_for_again(server, encoding):
    result = chat(server, stdin=b"a\xff\nHi\n\n", PYTHONIOENCODING=encoding)
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"That is not valid UTF-8; please ask again." in result.stdout
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "Hi"}]


def test_an_answer_that_the_terminal_cannot_show(server):
    result = chat(server, "Hi", PYTHONIOENCODING="ascii:strict")
    assert (result.returncode, result.stderr) == (0, b"")
    assert rb"The answer is \u4e16\u754c \U0001f642." in result.stdout


@pytest.mark.parametrize(
    "url", ["http://[", "http://a b\x01", "foo", "http://127.0.0.1:1", "", "http://127.0.0.1:99999"]
)
def test_urls_that_lead_nowhere(url, capsys):
    assert main(["chat", "--url", url, "--service", "none-of-that-name", "hello"]) == 2
    assert capsys.readouterr().err.startswith("r1-cluster: ")


def test_an_endpoint_of_another_kind(server, capsys):
    assert main(["chat", "--url", server.url, "hello"]) == 2  # its /v1/v1/models is not there
    assert capsys.readouterr().err.startswith("r1-cluster: there is nothing at /v1/v1/models")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "x"])
def test_a_temperature_that_is_no_number(value, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["chat", f"--temperature={value}", "hello"])
    assert caught.value.code == 2
    assert "--temperature" in capsys.readouterr().err


def test_what_the_server_refuses_is_its_sentence(server, capsys):
    url = server.url.removesuffix("/v1")
    assert main(["chat", "--url", url, "--temperature", "3", "hello"]) == 2
    assert "r1-cluster: temperature: input should be less than or equal to 2" in capsys.readouterr().err
    assert main(["chat", "--url", url, "--seed", str(10**200), "hello"]) == 2
    assert "digits" in capsys.readouterr().err
