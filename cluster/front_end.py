"""Turns requests into streams of text: admits, places, submits over links, orders tokens, detokenizes, stops."""

from __future__ import annotations

from .request import (
    Delta,
    FrontEndSettings,
    GenerateRequest,
    ModelInfo,
    RequestRefused,
    TokenLogprob,
    Usage,
)

__all__ = [
    "Delta",
    "FrontEnd",
    "FrontEndSettings",
    "GenerateRequest",
    "ModelInfo",
    "RequestRefused",
    "TokenLogprob",
    "Usage",
]


class FrontEnd:
    """Core of one front end; HTTP and gRPC stand on top. One asyncio loop uses it, one thread owns its links."""
