"""The process behind `braid up`: owns the Ray of our own (or one connection to an existing one) and the controller.

It leads a session of its own, so that everything it starts can be told apart from everything else. It hears orders on
stdin once, tells its parent on a pipe how the start goes, and answers `braid status` on a Unix socket.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .controller_settings import ControllerSettings
from .errors import BraidError, in_words
from .registry import Record, Registry
from .undertaker import hire

log = logging.getLogger(__name__)

TELL_INTERVAL_S = 0.25
DOWN_TIMEOUT_S = 30.0
ASK_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Orders:
    """Sent over stdin, not on the command line and not in a file: they hold secrets."""

    settings: ControllerSettings
    record: Record
    registry_root: Path
    outlives_parent: bool


class Supervisor:
    def __init__(self, orders: Orders, parent: BinaryIO) -> None:
        self.settings = orders.settings
        self.record = orders.record
        self.registry = Registry(orders.registry_root)
        self.parent = parent
        self.stop_asked = asyncio.Event()
        self.controller: Any = None

    async def run(self) -> int:
        """Brings the cluster up, keeps it, takes it down. 1 if it never came up."""
        self._hear_signals()
        control = await asyncio.start_unix_server(self._answer, str(self.record.control_path))
        failure: str | None = None
        try:
            self.tell({"state": "starting", "doing": "starting Ray" if self.settings.is_local else "joining Ray"})
            self._start_ray()
            self._hear_signals()  # Ray puts its own handlers in their place, which print a stack and abort
            failure = await self._bring_up()
            if failure is None:
                await self.stop_asked.wait()
        except Exception as error:
            log.exception("the supervisor failed")
            failure = in_words(error)
        finally:
            await self._take_down()
            control.close()
            self._clean_up(failure)
        return 0 if failure is None else 1

    def tell(self, news: dict[str, Any]) -> None:
        """A parent that no longer listens (`--detach`) is no reason to stop."""
        with suppress(OSError, ValueError):
            self.parent.write(json.dumps(news).encode() + b"\n")
            self.parent.flush()

    def _hear_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self.stop_asked.set)

    def _start_ray(self) -> None:
        from . import local_ray

        if self.settings.is_local:
            local_ray.start_ray(Path(self.record.run_dir), self.settings.spec)
        else:
            assert self.settings.spec.ray_address is not None
            local_ray.connect(self.settings.spec.ray_address)

    async def _bring_up(self) -> str | None:
        """None once the cluster serves, or was asked to stop before it did; else the reason why it could not."""
        from .launch import start_controller

        stopping = asyncio.ensure_future(self.stop_asked.wait())
        telling = asyncio.ensure_future(self._tell_progress())
        try:
            self.controller = start_controller(self.settings)
            rising = asyncio.ensure_future(call(self.controller.up.remote()))
            await asyncio.wait([rising, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not rising.done():
                rising.add_done_callback(lambda task: task.exception())
                return None
            self.tell({"state": "ready", "status": rising.result()})
        except BraidError as error:
            return str(error)
        finally:
            telling.cancel()
            stopping.cancel()
        return None

    async def _tell_progress(self) -> None:
        while True:
            if self.controller is not None:
                status = await call(self.controller.status.remote())
                self.tell({"state": "starting", "status": status})
            await asyncio.sleep(TELL_INTERVAL_S)

    async def _take_down(self) -> None:
        """The order goes out first and at once: a stopped Ray job has three seconds to live."""
        from . import local_ray

        if self.controller is not None:
            try:
                await call(self.controller.down.remote("asked by its supervisor"), DOWN_TIMEOUT_S)
            except Exception as error:  # it may have gone down by itself, after a failed start
                log.warning("the controller's teardown: %s", error)
        with suppress(Exception):
            local_ray.stop_ray()

    def _clean_up(self, failure: str | None) -> None:
        if failure is None:
            self.registry.remove(self.record)
            self.tell({"state": "stopped"})
            return
        log.error("not up: %s", failure)
        logs = self.registry.keep_logs(self.record)
        self.registry.remove(self.record)
        self.tell({"state": "failed", "reason": failure, "logs": str(logs)})

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """`braid status` connects, and reads one JSON object."""
        try:
            status: dict[str, Any] = {"name": self.record.name, "state": "starting", "workers": [], "problems": []}
            if self.controller is not None:
                status = await call(self.controller.status.remote(), ASK_TIMEOUT_S)
            writer.write(json.dumps(status).encode())
            await writer.drain()
        except Exception as error:
            log.warning("status could not be told: %s", error)
        finally:
            writer.close()


async def call(reference: Any, timeout_s: float | None = None) -> Any:
    """Awaits a Ray call; the controller's own exceptions come back as they are."""
    from ray.exceptions import RayTaskError

    try:
        return await asyncio.wait_for(_awaited(reference), timeout_s)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None


async def _awaited(reference: Any) -> Any:
    return await reference


def _stop_with_parent(stop: signal.Signals) -> None:
    """stdin ends when the parent does, however it ended. Read past Python's buffer, whose lock would outlive us."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), stop)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    parent = os.fdopen(os.dup(1), "wb")
    os.set_inheritable(parent.fileno(), False)
    os.dup2(2, 1)  # whatever anybody prints belongs in the log
    orders = pickle.load(sys.stdin.buffer)
    assert isinstance(orders, Orders), f"expected orders, got {type(orders).__name__}"
    if not orders.outlives_parent:
        threading.Thread(target=_stop_with_parent, args=(signal.SIGTERM,), daemon=True).start()
    _undertaker = hire() if orders.settings.is_local else None  # kept, or it would be a warning
    return asyncio.run(Supervisor(orders, parent).run())


if __name__ == "__main__":
    # pickle needs the one true module, not the copy of it that runs as __main__
    from braid.cluster import supervisor

    sys.exit(supervisor.main())
