"""How Mistral's instruct models write a conversation, by the version of their tokenizer.

mistral-common is what defines this (tokens/tokenizers/instruct.py there): it encodes each message by
itself, and the control tokens around them keep it so here. In version 1 [INST] is plain text, and
the system message opens the first user message; in 2 and 3 it opens the last one; from 7 on it
stands between control tokens of its own.
"""

from __future__ import annotations

__all__ = ["template"]

_HEAD = """\
{%- if tools -%}{{- raise_exception('this template has no form for tools') -}}{%- endif -%}
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages -%}
{%- set last_user = (turns | length - 1) // 2 * 2 -%}
{{- bos_token -}}
"""
_TURNS = """\
{%- for message in turns -%}
    {%- if message.role != ('assistant' if loop.index0 % 2 else 'user') -%}
        {{- raise_exception('after a system message, if any, user and assistant must take turns') -}}
    {%- elif message.role == 'user' -%}
        USER
    {%- else -%}
        ASSISTANT
    {%- endif -%}
{%- endfor -%}
"""
_SYSTEM = "{%- if system -%}{{- '[SYSTEM_PROMPT]' + system + '[/SYSTEM_PROMPT]' -}}{%- endif -%}\n"


def _turns(user: str, assistant: str) -> str:
    return _TURNS.replace("USER", user).replace("ASSISTANT", assistant)


_ASSISTANT = "{{- message.content.rstrip(' ') + eos_token -}}"
_V1 = _HEAD + _turns(
    "{{- '[INST] ' + (system + '\\n\\n' if system and loop.first else '') + message.content + ' [/INST]' -}}",
    "{{- ' ' + message.content + eos_token -}}",
)
_V3 = _HEAD + _turns(
    "{{- '[INST]' + (system + '\\n\\n' if system and loop.index0 == last_user else '') -}}"
    "{{- message.content + '[/INST]' -}}",
    _ASSISTANT,
)
_V7 = _HEAD + _SYSTEM + _turns("{{- '[INST]' + message.content + '[/INST]' -}}", _ASSISTANT)
_TEMPLATES = {"v1": _V1, "v2": _V3, "v3": _V3, "v7": _V7, "v11": _V7, "v13": _V7}


def template(version: str) -> str | None:
    """The jinja source for a tokenizer of `version` ("v3"); None for one that isn't known here.

    Text alone: tools, images and a reply to be continued have no form in it.
    """
    return _TEMPLATES.get(version)
