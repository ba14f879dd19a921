"""Chat templates: what they render, and that hostile ones end soon in an error."""

from __future__ import annotations

import json
import threading
from datetime import datetime
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from chandra.errors import TemplateError
from chandra.text import fallbacks
from chandra.text.fallbacks import fallback_template
from chandra.text.template import MAX_TEMPLATE, MAX_VALUE, ChatTemplate

USER = [{"role": "user", "content": "Hi"}]
SYSTEM = {"role": "system", "content": "Be <b>kind</b> & short."}
CHAT = [SYSTEM, *USER, {"role": "assistant", "content": " Yo "}, *USER]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "é": ["<", None, 1.5]}}}]

TEMPLATES = {
    "tools": "{% if tools %}{{ tools | tojson(indent=2) }}|{{ tools[0] | tojson }}{% endif %}{{ messages | length }}",
    "loop": """{%- for message in messages -%}
        {%- if loop.first and message.role != 'system' %}{{ raise_exception('x') }}{% endif -%}
        {{ loop.index }}/{{ loop.length }}{{ ' last' if loop.last }} {{ loop.nextitem is defined }}
        {{- message['content'] | trim }}
        {%- if loop.index0 == 2 %}{% break %}{% endif %}
    {% endfor %}{% if add_generation_prompt %}>{% endif %}""",
    "macro": """{% macro turn(m, n=1) %}[{{ m.role|upper }}:{{ m.content.strip().split(' ')[-1] * n }}]{% endmacro %}
        {%- set ns = namespace(seen=0, text='') %}{% for m in messages if m.role != 'system' %}
        {%- set ns.seen = ns.seen + 1 %}{% set ns.text = ns.text ~ turn(m, n=2) ~ ns.seen %}{% endfor %}
        {{ ns.text }}""",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "filters": """{{ messages | map(attribute='role') | unique | join(', ') }}
        {{ messages | selectattr('role', 'equalto',
        'user') | list | length }} {{ {'b': 1, 'a': [2]} | dictsort }} {{ 'x' | default('y') }} {{ nothing | d('z') }}
        {{ 'a-b'.replace('-', '+') }} {{ 7 % 3 + 2 ** 3 }} {{ '%s=%d' % ('a', 1) }} {{ [1, 2, 3][::-1] }}
        {{ 'é' is string }}
        {% set text %}block {{ messages[0].role }}{% endset %}{{ text | indent(4) }} {{ enable_thinking }}""",
    "recursive": "{% for x in [[1, [2]], []] recursive %}({{ loop(x) if x is iterable else x }}){% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_templates_render_as_in_transformers(name: str, tools: Any) -> None:
    source = TEMPLATES[name]
    variables = {"enable_thinking": False, "bos_token": "<s>", "eos_token": "</s>"}
    expected, _ = render_jinja_template(
        [CHAT], tools=tools, chat_template=source, add_generation_prompt=True, **variables
    )
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    assert template.render(CHAT, tools=tools, enable_thinking=False) == expected[0]


def test_a_template_knows_the_day_and_may_refuse() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(USER) == str(datetime.now().year)
    with pytest.raises(TemplateError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(USER)


def test_without_a_generation_prompt() -> None:
    template = ChatTemplate(fallbacks.CHATML)
    assert template.render(USER, add_generation_prompt=False) == "<|im_start|>user\nHi<|im_end|>\n"


HOSTILE = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "empty loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loop over a filter": "{% for i in range(99999) %}{{ (range(99999) | list) | length }}{% endfor %}",
    "endless recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "wide recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "block in itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "endless output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "doubling by ~": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by set": """{% set n = namespace(x='a') %}{% for i in range(99) %}
        {%- set y %}{{ n.x }}{{ n.x }}{% endset %}
        {%- set n.x = y %}{% endfor %}""",
    "lists of lists": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}",
    "namespaces": """{% set n = namespace(x=1) %}{% for i in range(99) %}
        {%- set n.x = namespace(a=n.x, b=n.x) %}{% endfor %}""",
    "text times number": "{{ 'a' * 10**10 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "squares": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "round": "{{ 1.5 | round(10**9, 'ceil') }}",
    "field width": "{{ '%1000000000d' % 1 }}",
    "starred width": "{{ '%*d' % (10**9, 1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "strftime": "{{ strftime_now('%1000000000Y') }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "center": "{{ 'a' | center(10**9) }}",
    "bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "replace": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "mapped replace": "{{ range(9999) | map('replace', '9', 'b' * 9999) | map('replace', 'b', 'c' * 999) | join }}",
    "join": "{{ (['a'] * 100000) | join('b' * 1000000) }}",
    "json indent": "{{ [[[[1]]]] | tojson(indent=10**8) }}",
    "class": "{{ ().__class__.__base__.__subclasses__() }}",
    "class by filter": "{{ (messages | attr('__class__')).mro() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "function globals": "{{ raise_exception.__globals__['json'] }}",
    "mutation": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "lorem": "{{ lipsum(10**6) }}",
    "deep parentheses": "{{ " + "(" * 400 + "1" + ")" * 400 + " }}",
    "long sum": "{{ " + "1+" * 5000 + "1 }}",
    "deep loops": "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    "no Jinja": "{% if %}",
    "undefined": "{{ nothing.at.all }}",
    "division": "{{ 1 // 0 }}",
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_a_hostile_template_ends_in_an_error(name: str) -> None:
    threads = threading.active_count()
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(HOSTILE[name]).render(USER)
    assert caught.value.hint
    assert len(caught.value.message) < 700
    assert threading.active_count() == threads


def test_the_sizes_are_limited() -> None:
    assert len(ChatTemplate("{{ 'a' * n }}").render(USER, n=MAX_VALUE // 2)) == MAX_VALUE // 2
    with pytest.raises(TemplateError):
        ChatTemplate("{{ 'a' * n }}{{ 'a' * n }}").render(USER, n=MAX_VALUE // 2 + 1)
    with pytest.raises(TemplateError, match="characters"):
        ChatTemplate("a" * (MAX_TEMPLATE + 1))


def test_a_long_conversation_is_no_attack() -> None:
    turn = "{% for m in messages %}{{ m.role ~ ': ' + m.content.replace('</think>', '') | trim + '\n' }}{% endfor %}"
    messages = [{"role": "user", "content": f"{'word ' * 400}{i}"} for i in range(400)]
    messages.append({"role": "assistant", "content": "x" * 1_000_000})
    assert len(ChatTemplate(turn).render(messages)) > 1_800_000


def test_messages_reach_the_template_as_plain_data() -> None:
    class Loud(str):
        def strip(self, *_: Any) -> str:  # type: ignore[override]
            raise AssertionError

    assert ChatTemplate("{{ messages[0].content.strip() }}").render([{"content": Loud(" a ")}]) == "a"
    with pytest.raises(TemplateError, match="object"):
        ChatTemplate("").render([{"content": object()}])


def test_strings_of_the_messages_are_quoted_and_the_templates_own_are_not() -> None:
    template = ChatTemplate("a{{ messages[0].content[0].text }}{{ tools[0].f }}", quote=lambda text: f"({text})")
    assert template.render([{"content": [{"text": "x"}]}], tools=[{"f": "y"}]) == "a(x)(y)"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda items: st.lists(items) | st.dictionaries(st.text(), items),
)


@settings(deadline=None, max_examples=50)
@given(value=json_values)
@example(10**9)
def test_tojson_is_json(value: Any) -> None:
    rendered = ChatTemplate("{{ messages[0].value | tojson }}").render([{"value": value}])
    assert rendered == json.dumps(value, ensure_ascii=False)


class Knows:
    """A tokenizer, as far as a fallback asks it."""

    def __init__(self, *tokens: str) -> None:
        self._tokens = tokens

    def find(self, token: str) -> int | None:
        return 0 if token in self._tokens else None


@pytest.mark.parametrize(
    ("tokens", "arch", "expected"),
    [
        (["<|im_start|>"], "qwen2", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        (
            ["<|start_header_id|>"],
            "llama",
            "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (["<start_of_turn>"], "gemma", "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"),
        (["<|end|>", "<|assistant|>"], "phi3", "<|user|>\nHi<|end|>\n<|assistant|>\n"),
        (["<|assistant|>"], "stablelm", "<|user|>\nHi</s>\n<|assistant|>\n"),
        (["[INST]"], "llama", "<s>[INST] Hi [/INST]"),
        ([], "mistral", "<s>[INST] Hi [/INST]"),
        ([], "gpt2", "### Instruction:\nHi\n\n### Response:\n"),
    ],
)
def test_a_model_without_a_template_gets_one_for_its_tokens(tokens: list[str], arch: str, expected: str) -> None:
    source = fallback_template(Knows(*tokens), arch)  # type: ignore[arg-type]
    assert ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(USER) == expected
    assert "Yo" in ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(CHAT)
