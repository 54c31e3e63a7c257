"""What tests of the front end share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from scripted_front import ScriptedFront, model_info, served, small_tokenizer
from scripted_worker import write_tokenizer

from braid.model.tokenizer import Tokenizer


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="braid") as directory:  # a socket path has at most 107 bytes
        yield Path(directory)


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    made: Tokenizer = small_tokenizer(tmp_path_factory.mktemp("model"))
    return made


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[tuple[ScriptedFront, str]]:
    """A scripted front end and the address of the HTTP server before it."""
    front = ScriptedFront(tokenizer)
    with served(front, model_info(tokenizer, "use restrictions")) as port:
        yield front, f"http://127.0.0.1:{port}"


@pytest.fixture
def front(server: tuple[ScriptedFront, str]) -> ScriptedFront:
    server[0].reset()
    return server[0]


@pytest.fixture
def url(server: tuple[ScriptedFront, str], front: ScriptedFront) -> str:
    return server[1]


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client
