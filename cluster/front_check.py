"""Asks the front ends whether they can serve: what a client would find, not what we believe."""

from __future__ import annotations

import asyncio
import http.client
import json
from typing import Any

from .controller_settings import ControllerSettings

TIMEOUT_S = 5.0


def check_http(settings: ControllerSettings) -> dict[str, Any]:
    """Ready once /health answers 200."""
    if not settings.with_http:
        return {"ready": True, "reason": "deployed by the platform"}
    spec = settings.spec.front_end
    connection = http.client.HTTPConnection(reachable(spec.host), spec.http_port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException) as error:
        return {"ready": False, "reason": f"/health: {error}"}
    finally:
        connection.close()
    return {"ready": answer.status == 200, "reason": f"/health answers {answer.status}", **_fields(body)}


async def check_grpc(actor: Any, settings: ControllerSettings) -> dict[str, Any]:
    """Ready once a worker for prompts and one for decoding have told the front end their load."""
    try:
        load: dict[str, Any] = await asyncio.wait_for(actor.load.remote(), TIMEOUT_S)
    except Exception as error:  # Ray's many ways of saying that an actor is gone
        return {"ready": False, "reason": f"{type(error).__name__}: its process does not answer"}
    return load if load["ready"] else {"reason": "it is linked with no worker for prompts, or none to decode", **load}


def reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def address(host: str, port: int) -> str:
    """As URLs and gRPC want it: IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _fields(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body)
    except ValueError:
        return {}
    return {"health": data} if isinstance(data, dict) else {}
