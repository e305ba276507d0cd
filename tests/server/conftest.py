"""A server in this process, on real sockets, in front of the scripted core of tests/engine.

The model is a folder with a byte-level tokenizer and a chat template: id i is byte i, and a stream
repeats its prompt from the seed's place on, so each test knows its tokens beforehand.
"""

import asyncio
import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from millrace.engine.config import EngineConfig
from millrace.engine.server.grpc_server import Server
from millrace.v1 import admin_pb2_grpc, inference_pb2_grpc

FAKE_CORE = Path(__file__).parents[1] / "engine" / "fake_core.py"
BOS, EOS, VOCAB_SIZE = 256, 257, 258
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_byte_model(path: Path) -> Path:
    """Write the text side of a model into `path`."""
    alphabet = byte_alphabet()
    vocab = {alphabet[i]: i for i in range(256)} | {"<bos>": BOS, "<eos>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(special))
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "vocab_size": VOCAB_SIZE}
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **ids}))
    return path


def byte_alphabet() -> list[str]:
    """The character that byte-level BPE writes for each byte (from GPT-2's bytes_to_unicode)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (i for i in range(256) if i not in printable)
    shifted = {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [shifted.get(i, chr(i)) for i in range(256)]


class LiveServer:
    """A Server on its own event loop in its own thread, with a channel to it."""

    def __init__(self, model_path: Path, *core_options: str, **settings: Any) -> None:
        settings = {"model": str(model_path), "port": 0, "http_port": 0} | settings
        command = (sys.executable, "-P", str(FAKE_CORE), *core_options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.server = self.call(make_server(EngineConfig(**settings), command))
        self.call(self.server.listen())
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.server.port}")
        self.inference = inference_pb2_grpc.InferenceStub(self.channel)
        self.admin = admin_pb2_grpc.AdminStub(self.channel)

    def call(self, work: Coroutine[Any, Any, Any], timeout_s: float = 30.0) -> Any:
        """Run a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def start_engine(self) -> "LiveServer":
        self.call(self.server.start_engine())
        return self

    def close(self) -> None:
        self.channel.close()
        self.call(self.server.close(0.2))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()  # the loop stays open: see one_event_loop in tests/conftest.py

    def wait_idle(self, within_s: float = 5.0) -> None:
        """Return once the core runs nothing; fails if that takes longer."""
        wait_until(lambda: self.server.engine().stats.running == 0, within_s)


async def make_server(config: EngineConfig, command: tuple[str, ...]) -> Server:
    """Made on the loop it belongs to, as grpc.aio asks for."""
    return Server(config, command)


def wait_until(true: Callable[[], bool], within_s: float = 5.0) -> None:
    end_s = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end_s, f"not within {within_s} s"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def _one_event_loop(one_event_loop: None) -> None:
    """For every test here."""


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the byte model."""
    return save_byte_model(tmp_path_factory.mktemp("byte_model"))


@pytest.fixture(scope="session")
def live_server(byte_model: Path) -> Callable[..., contextlib.AbstractContextManager[LiveServer]]:
    """A factory of servers that listen but have no engine yet."""

    @contextlib.contextmanager
    def listening(*core_options: str, **settings: Any) -> Iterator[LiveServer]:
        server = LiveServer(byte_model, *core_options, **settings)
        try:
            yield server
        finally:
            server.close()

    return listening


@pytest.fixture(scope="module")
def served(live_server: Callable[..., Any]) -> Iterator[LiveServer]:
    """One server that takes 5 ms a step, shared by the tests of a file."""
    with live_server("--step-s", "0.005", "--slots", "16") as server:
        yield server.start_engine()
