"""What both front ends are made of: a FrontEnd core and what it may tell clients about the model."""

from __future__ import annotations

import secrets

from ..actors.tracing import setup_tracer
from ..model.tokenizer import Tokenizer
from .controller_settings import ControllerSettings
from .front_end import FrontEnd
from .request import FrontEndSettings, ModelInfo


def make_front(settings: ControllerSettings, kind: str) -> FrontEnd:
    """A core under a name of its own: two lives of a front end must not be taken for one."""
    spec, name = settings.spec, f"{kind}-{secrets.token_hex(3)}"
    front_settings = FrontEndSettings(
        name=name,
        secret=settings.secret,
        model_name=spec.served_name,
        vocab_size=settings.model.vocab_size,
        max_model_len=settings.model.max_model_len,
        max_waiting=spec.front_end.max_waiting,
        request_timeout_s=spec.front_end.request_timeout_s,
    )
    return FrontEnd(front_settings, Tokenizer(settings.model.path), setup_tracer("braid-front", f"{spec.name}/{name}"))


def model_info(settings: ControllerSettings) -> ModelInfo:
    model = settings.model
    return ModelInfo(
        name=settings.spec.served_name,
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        architecture=model.architecture,
        created=model.created,
        notices=model.notices,
    )
