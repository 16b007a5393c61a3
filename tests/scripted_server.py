"""The service's own edge around a model that says what it is told to: what clients send and understand is tried
without a cluster."""

import asyncio
import json
import threading
import time

import uvicorn
from make_checkpoint import make_checkpoint
from running_service import free_port

from r1_cluster.api.chat import ChatStream
from r1_cluster.config import Sampling, Serve
from r1_cluster.edge.app import build_edge
from r1_cluster.edge.body import BodyReader
from r1_cluster.edge.prepare import PrepareOptions, Preparer
from r1_cluster.edge.sse import frames
from r1_cluster.records import TokenDelta
from r1_cluster.text.tokenizer import Piece

THOUGHT, ANSWER = "Let me see.\n\nIt is 世界.", "The answer is 世界 🙂."


class ScriptedServer:
    """Answers every chat with THOUGHT and `answer` (None: the thought does not end), two tokens at a time, after
    `silence_s`. `bodies` holds what came in, `prompts` what the model would have read."""

    places = 100

    def __init__(self, folder):
        """`folder` is filled with a small checkpoint, for its tokenizer and template."""
        make_checkpoint(folder, num_hidden_layers=1, n_routed_experts=8)
        self._preparer = Preparer(PrepareOptions(str(folder), "nano", Sampling(), 2048, 1000))
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        limits = Serve()
        app = build_edge(self, BodyReader(limits.max_body_bytes, limits.body_timeout_s))
        config = uvicorn.Config(app, port=self.port, log_level="warning", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self.forget()

    def forget(self):
        """Begins anew, for another test."""
        self.bodies, self.prompts = [], []
        self.answer, self.silence_s = ANSWER, 0.0

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

    async def health(self):
        return {"status": "ready"}

    def model_card(self):
        return {"id": "nano", "object": "model", "created": 0, "owned_by": "tests", "max_model_len": 2048}

    def enter(self):
        pass

    async def chat(self, body):
        self.bodies.append(json.loads(body))
        chat, record, thought = self._preparer.prepare(body)
        self.prompts.append(self._preparer.tokenizer.decode(record.prompt))
        stream = ChatStream(
            chat,
            self._preparer.tokenizer,
            thought=thought,
            prompt_tokens=len(record.prompt),
            request_id=str(len(self.bodies)),
        )
        deltas = self._deltas(chat.thinking)
        if chat.stream:
            return frames(stream, [], deltas)
        while not stream.finished:
            stream.feed(await anext(deltas))
        await deltas.aclose()
        return stream.whole()

    async def _deltas(self, thinking):
        await asyncio.sleep(self.silence_s)
        text = THOUGHT if self.answer is None else f"{THOUGHT}\n</think>\n\n{self.answer}"
        tokenizer = self._preparer.tokenizer
        ids = tokenizer.encode_pieces([Piece(text if thinking else self.answer, True)])
        ids += tokenizer.eos_ids
        for start in range(0, len(ids), 2):
            reason = "stop" if start + 2 >= len(ids) else None
            yield TokenDelta("r", start, ids[start : start + 2], reason)
