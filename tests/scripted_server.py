"""A server that reads requests and writes answers with the service's own code, around a model that says what it
is told to: what clients send and understand is tried without a cluster."""

import json
import threading
import time

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from make_checkpoint import make_checkpoint
from running_service import free_port

from r1_cluster.api.chat import ChatStream
from r1_cluster.api.errors import ApiError
from r1_cluster.api.protocol import parse_chat_request
from r1_cluster.api.sampling import check_stop_tokens, sampling_of
from r1_cluster.config import Sampling
from r1_cluster.records import TokenDelta
from r1_cluster.text.template import ChatTemplate
from r1_cluster.text.tokenizer import Piece, Tokenizer

THOUGHT, ANSWER = "Let me see.\n\nIt is 世界.", "The answer is 世界 🙂."


class ScriptedServer:
    """Answers every chat with THOUGHT and `answer` (None: the thought does not end), two tokens at a time. `bodies`
    holds what came in, `prompts` what the model would have read."""

    def __init__(self, folder):
        """`folder` is filled with a small checkpoint, for its tokenizer and template."""
        make_checkpoint(folder, num_hidden_layers=1, n_routed_experts=8)
        self.bodies, self.prompts, self.answer = [], [], ANSWER
        self._tokenizer = Tokenizer.from_folder(folder)
        self._template = ChatTemplate.from_folder(folder, self._tokenizer)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        app = FastAPI(openapi_url=None)
        app.add_api_route("/v1/chat/completions", self._chat, methods=["POST"])
        app.add_api_route("/v1/models", lambda: {"data": [{"id": "nano"}]})
        app.add_exception_handler(ApiError, lambda _, error: JSONResponse(error.body(), error.status))
        self._server = uvicorn.Server(
            uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="warning", lifespan="off")
        )
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self):
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    async def _chat(self, request: Request):
        data = await request.body()
        self.bodies.append(json.loads(data))
        chat = parse_chat_request(data)
        check_stop_tokens(chat, 1000, self._tokenizer.think_end_id)
        sampling_of(chat, Sampling(), drawn_seed=1)
        prompt = self._template.prompt_ids(chat.messages, thinking=chat.thinking)
        self.prompts.append(self._tokenizer.decode(prompt))
        stream = ChatStream(
            chat, self._tokenizer, prompt_tokens=len(prompt), request_id=str(len(self.bodies))
        )
        frames = list(self._frames(stream, chat.thinking))
        if chat.stream:
            return StreamingResponse(iter(frames), media_type="text/event-stream")
        return JSONResponse(stream.whole())

    def _frames(self, stream, thinking):
        text = THOUGHT if self.answer is None else f"{THOUGHT}\n</think>\n\n{self.answer}"
        if not thinking:
            text = self.answer
        ids = [*self._tokenizer.encode_pieces([Piece(text, True)]), *self._tokenizer.eos_ids]
        for start in range(0, len(ids), 2):
            reason = "stop" if start + 2 >= len(ids) else None
            yield b"".join(stream.feed(TokenDelta("r", start, ids[start : start + 2], reason)))
