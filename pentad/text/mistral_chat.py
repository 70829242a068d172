"""The chat templates of Mistral's instruct models, by the version of their tokenizer.

mistral-common (tokens/tokenizers/instruct.py) defines them. It encodes each message separately; here the control
tokens around a message have the same effect. In version 1, `[INST]` is plain text. The system message opens the first
user message in version 1, and the last one in versions 2 and 3; from version 7 on it has its own control tokens.
"""

__all__ = ["template"]

_HEAD = """\
{%- if tools -%}{{- raise_exception('this template does not support tools') -}}{%- endif -%}
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages -%}
{%- set last_user = (turns | length - 1) // 2 * 2 -%}
{{- bos_token -}}
"""
_TURNS = """\
{%- for message in turns -%}
    {%- if message.role != ('assistant' if loop.index0 % 2 else 'user') -%}
        {{- raise_exception('user and assistant must alternate, after an optional system message') -}}
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
    """The jinja source for a tokenizer of `version` (such as "v3"), or None if the version is unknown.

    The templates support text only: no tools, no images, no continuation of a reply.
    """
    return _TEMPLATES.get(version)
