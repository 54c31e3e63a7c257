"""An engine behind its own OpenAI server: starts the server, then sends every job's prompts at once and streams.

    python -m braid.benchmarks.rivals.http PORT READY_TIMEOUT_S MODEL_NAME SERVER COMMAND ...

The server is up when it answers a completion.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import aiohttp

from .session import Answers, Stopwatch, serve, take_stdout

POLL_S, STOP_S, JOB_TIMEOUT_S = 0.25, 60.0, 1200.0


class Http:
    def __init__(self, port: int, model: str, timeout_s: float, command: Sequence[str]) -> None:
        self.version = "its own server"
        self._url, self._model = f"http://127.0.0.1:{port}/v1/completions", model
        self._server = subprocess.Popen(list(command))
        try:
            self._wait_ready(time.monotonic() + timeout_s)
        except BaseException:
            self.close()
            raise

    def generate(self, prompts: Sequence[list[int]], new_tokens: int) -> Answers:
        return asyncio.run(self._generate(prompts, new_tokens))

    def close(self) -> None:
        if self._server.poll() is None:
            self._server.send_signal(signal.SIGTERM)
            try:
                self._server.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._server.kill()

    def _wait_ready(self, deadline: float) -> None:
        while True:
            try:
                self.generate([[5, 6, 7]], 1)
                return
            except (aiohttp.ClientError, OSError):
                if self._server.poll() is not None:
                    raise RuntimeError(f"the server ended with exit code {self._server.returncode}") from None
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_S)

    async def _generate(self, prompts: Sequence[list[int]], new_tokens: int) -> Answers:
        timeout = aiohttp.ClientTimeout(total=JOB_TIMEOUT_S)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            clock = Stopwatch()
            streams = [self._stream(session, prompt, new_tokens, clock) for prompt in prompts]
            answers = await asyncio.gather(*streams)
        return Answers([ids for ids, _ in answers], [times for _, times in answers])

    async def _stream(
        self, session: aiohttp.ClientSession, prompt: list[int], new_tokens: int, clock: Stopwatch
    ) -> tuple[list[int], list[float]]:
        body = {"model": self._model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "return_token_ids": True}
        ids: list[int] = []
        times: list[float] = []
        async with session.post(self._url, json=body) as response:
            if response.status != 200:
                raise aiohttp.ClientError(f"{response.status}: {(await response.text())[:200]}")
            async for line in response.content:
                for new in _token_ids(line):
                    times += [clock()] * len(new)
                    ids += new
        if len(ids) != new_tokens:
            raise RuntimeError(f"asked for {new_tokens} tokens, got {len(ids)}")
        return ids, times


def _token_ids(line: bytes) -> Iterator[list[int]]:
    """Of the choices in one line of a server-sent event stream."""
    if line.startswith(b"data: {"):
        event: dict[str, Any] = json.loads(line[6:])
        if "error" in event:
            raise RuntimeError(f"the server answered {event['error']}")
        for choice in event["choices"]:
            yield choice.get("token_ids") or []


if __name__ == "__main__":
    out = take_stdout()
    port, timeout_s, model, *command = sys.argv[1:]
    serve(Http(int(port), model, float(timeout_s), command), out)
