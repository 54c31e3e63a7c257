"""Chat text is what transformers makes of the same template and messages."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from braid.model.chat_template import ChatTemplate, find_template
from braid.model.tokenizer import Tokenizer

TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>"}
# in the manner of DeepSeek's: system texts first, then turns; the assistant's ends with the end token
DEEPSEEK_LIKE = """
{%- if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(system='', after_user=false) %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {%- set ns.system = ns.system + ('' if loop.first else '\\n\\n') + message['content'] %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}{{ ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{% continue %}{% endif %}
    {%- if message['role'] == 'user' %}
        {%- set ns.after_user = true %}
        {{- '<|User|>' + message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {%- if not ns.after_user %}{{ raise_exception('an assistant turn must follow a user turn') }}{% endif %}
        {%- generation %}
        {{- '<|Assistant|>' + message['content'].split('</think>')|last + eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- raise_exception('unknown role ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{% if tools %}
    {{ tools | tojson(indent=2) }}
{% endif %}
{%- if add_generation_prompt %}{{ '<|Assistant|>' + ('<think>\\n' if thinking else '') }}{% endif %}
"""
JSONISH = (
    "{% for m in messages %}\n  {% if true %}\n{{ m | tojson }}\n  {% endif %}\n{% endfor %}\n{{ strftime_now('%%') }}"
)
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "be <b>brief</b>"}, {"role": "user", "content": "héllo 😀 \"'&"}],
    [
        {"role": "system", "content": "a"},
        {"role": "system", "content": "b"},
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "<think>x</think>2"},
        {"role": "user", "content": "3\n"},
    ],
]


def oracle(template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(models.BPE()), **TOKENS)
    rendered = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **variables)
    assert isinstance(rendered, str)
    return rendered


@pytest.mark.parametrize("template", [DEEPSEEK_LIKE, JSONISH])
@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("variables", [{}, {"thinking": True}])
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers_does(
    template: str, messages: list[dict[str, Any]], variables: dict[str, Any], prompt: bool
) -> None:
    ours = ChatTemplate(template, TOKENS).render(messages, prompt, variables)
    assert ours == oracle(template, messages, add_generation_prompt=prompt, **variables)


def test_time_comes_from_the_clock_handed_in() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b') }}", {}, now=lambda: datetime(2026, 11, 23))
    assert template.render([]) == "23 Nov"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (DEEPSEEK_LIKE, "unknown role robot"),
        ("{{ messages[0].content.nothing.at_all }}", "has no attribute"),
        ("{{ 'a' + messages[0]['missing'] + 1 }}", ""),
        ("{{ messages[9].role }}", ""),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(999999999) %}{% endfor %}", "Range too big"),
    ],
)
def test_errors_of_the_template_become_value_errors(source: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"the chat template refuses these messages: .*{reason}"):
        ChatTemplate(source, TOKENS).render([{"role": "robot", "content": "x"}])


def test_a_template_that_does_not_compile_is_said_at_once() -> None:
    with pytest.raises(ValueError, match="does not compile"):
        ChatTemplate("{% if %}", {})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Tokenizer]:
    def make(**config: Any) -> Tokenizer:
        tokenizers.Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return Tokenizer(tmp_path)

    return make


def test_the_template_is_found_where_checkpoints_keep_it(checkpoint: Callable[..., Tokenizer], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        checkpoint().render([])
    assert checkpoint(chat_template="{{ bos_token }}!", bos_token={"content": "<b>"}).render([]) == "<b>!"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert checkpoint(chat_template=named).render([]) == "plain"
    assert checkpoint(chat_template=named[:1]).render([]) == "tools"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert checkpoint(chat_template="x").render([]) == "from the file"


def test_a_template_of_another_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="chat_template is a int"):
        find_template(tmp_path, {"chat_template": 3})
