"""Templates written by strangers: what they may not do ends in one line, soon, in little memory."""

import tracemalloc

import pytest

from pentad.errors import BadInput
from pentad.text.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "hi"}]
WORK = "more work than its messages warrant"


def loops(body: str, condition: str = "true") -> str:
    """Runs `body` a million times."""
    inner = f"{{% for b in range(999) if {condition} %}}{body}{{% endfor %}}"
    return f"{{% for a in range(999) %}}{inner}{{% endfor %}}"


def grows(start: str, step: str, use: str = "") -> str:
    """Starts with a value and doubles it 99 times."""
    loop = f"{{% for i in range(99) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
    return f"{{% set ns = namespace(x={start}) %}}{loop}{use}"


def nested(use: str) -> str:
    """A tuple that holds itself twice, and so on."""
    return grows("(1,)", "(ns.x, ns.x)", use)


HOSTILE = {
    "attribute": ("{{ ''.__class__.__mro__ }}", "__class__"),
    "attr filter": ("{{ ''|attr('__class__') }}", "__class__"),
    "globals": ("{{ raise_exception.__globals__ }}", "__globals__"),
    "context": ("{{ self._TemplateReference__context }}", "unsafe"),
    "changing messages": ("{{ messages.append(1) }}", "append"),
    "format's fields": ("{{ '{0.__class__}'.format(1) }}", "__class__"),
    "include": ("{% include 'x' %}", "no loader"),
    "autoescape": ("{% autoescape true %}{% endautoescape %}", "autoescape"),
    "endless loop": (loops(""), WORK),
    "loop that keeps nothing": (loops("", "false"), WORK),
    "loop of static text": (loops("x" * 1000), WORK),
    "loop in a set block": ("{% set x %}" + loops("x" * 1000) + "{% endset %}", WORK),
    "loop of filters": (loops("{{ 'a'|upper|lower|length }}"), WORK),
    "loop of methods": (loops("{{ 'a'.strip() }}"), WORK),
    "loop of tests": (loops("{{ a is odd and b is number }}"), WORK),
    "loop of comparisons": (loops("{{ a == b or a in [b] }}"), WORK),
    "lazy filters": (loops("{{ range(999)|select('none')|map('upper')|first }}"), WORK),
    "recursive loop": ("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", "recursion"),
    "recursive macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "branching macro": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(50) }}",
        WORK,
    ),
    "recursive block": ("{% block a %}{{ self.a() }}{% endblock %}", "recursion"),
    "budget given back": ("{{ [1]|map('~tick', -10**15)|list }}" + loops(""), WORK),
    "* of text": ("{{ 'a' * 10**9 }}", WORK),
    "* of a list": ("{{ 10**9 * [0] }}", WORK),
    "~ doubling": (grows("'a'", "ns.x ~ ns.x", ""), WORK),
    "+ doubling": (grows("'a'", "ns.x + ns.x", ""), WORK),
    "+ doubling of lists": (grows("[1]", "ns.x + ns.x", ""), WORK),
    "set block doubling": (
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}"
        "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
        WORK,
    ),
    "nested, printed": (nested("{{ ns.x }}"), WORK),
    "nested, as JSON": (nested("{{ ns.x|tojson }}"), WORK),
    "nested, compared": (nested("{{ ns.x == ns.x[0] }}"), WORK),
    "nested, as a key": (nested("{{ {ns.x: 1} }}"), WORK),
    "nested, looked up": (nested("{{ {1: 1}[ns.x] }}{{ {1: 1}.get(ns.x) }}"), WORK),
    "a namespace in itself": (
        "{% set ns = namespace() %}{% set ns.x = [ns, ns] %}{{ ns }}",
        WORK,
    ),
    "integers": (grows("3", "ns.x * ns.x", ""), "too large"),
    "power": ("{{ 9 ** 999999999 }}", "too large"),
    "round": ("{{ 1|round(999999999) }}", "too large"),
    "int": ("{{ ('9' * 100000)|int }}", "too large"),
    "replace filter": ("{{ ('a' * 9999)|replace('a', 'b' * 9999) }}", WORK),
    "replace method": ("{{ ('a' * 9999).replace('a', 'b' * 9999) }}", WORK),
    "join filter": ("{{ range(9999)|join('b' * 9999) }}", WORK),
    "join method": ("{{ ('b' * 9999).join(['a'] * 9999) }}", WORK),
    "center filter": ("{{ 'a'|center(10**9) }}", WORK),
    "center method": ("{{ 'a'.center(10**9) }}", WORK),
    "ljust": ("{{ 'a'.ljust(10**9) }}", WORK),
    "zfill": ("{{ 'a'.zfill(10**9) }}", WORK),
    "expandtabs": ("{{ '\\t'.expandtabs(10**9) }}", WORK),
    "indent": ("{{ ('\\n' * 9999)|indent(9999) }}", WORK),
    "format": ("{{ '{:999999999}'.format(1) }}", "too wide"),
    "format by its own values": ("{{ '{:{w}}'.format(1, w=999999999) }}", "too wide"),
    "format of a large value": ("{{ ('{0}' * 9999).format('b' * 9999) }}", WORK),
    "format_map": ("{{ ('{a}' * 9999).format_map({'a': 'b' * 9999}) }}", WORK),
    "format filter": ("{{ '%999999999d'|format(1) }}", "too wide"),
    "% operator": ("{{ '%*d' % (999999999, 1) }}", "too wide"),
    "% of a large value": ("{{ ('%(a)s' * 9999) % {'a': 'b' * 9999} }}", WORK),
    "tojson": ("{{ [[1]]|tojson(indent=999999999) }}", "too wide"),
    "batch": ("{{ [1]|batch(10**9, 0)|list }}", WORK),
    "slice": ("{{ [1]|slice(10**9)|list }}", WORK),
    "sum": ("{{ ([[1]] * 99)|sum(start=[]) }}", "sum is for numbers"),
    "split": ("{{ ('a,' * 999999).split(',') }}", WORK),
    "splitlines": ("{{ ('\\n' * 999999).splitlines() }}", WORK),
    "searching backwards": ("{{ ('a' * 999999).rfind('b' + 'a' * 99999) }}", WORK),
    "list": ("{{ ('a' * 999999)|list }}", WORK),
    "sort": ("{{ range(99999)|sort }}", WORK),
    "urlencode": ("{{ ('é' * 999999)|urlencode }}", WORK),
    "strftime": ("{{ strftime_now('%999999999d') }}", "too long"),
    "lipsum": ("{{ lipsum(n=9999) }}", "lipsum"),
    "raised": ("{{ raise_exception('not\nthis') }}", "not this"),
    "undefined": ("{{ nothing.at_all }}", "'nothing' is undefined"),
}

BROKEN = {
    "syntax": ("a\n{% if %}", "line 2: Expected an expression"),
    "unknown filter": ("{{ 1|pprint }}", "line 1: No filter named 'pprint'"),
    "unknown tag": ("{% do x %}", "unknown tag 'do'"),
    "deep": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
    "deep blocks": ("{% if 1 %}" * 200 + "{% endif %}" * 200, "chat template"),
    "long": ("a" * 300_000, "pentad takes up to"),
}


@pytest.mark.parametrize(("source", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile(source: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        ChatTemplate(source).render({"messages": MESSAGES})
    assert str(error.value).startswith("chat template: ")
    assert "\n" not in str(error.value)


# Tracing memory makes loops slow.
GREEDY = {name: source for name, (source, _) in HOSTILE.items() if "range(999)" not in source}
del GREEDY["branching macro"]


@pytest.mark.parametrize("source", GREEDY.values(), ids=GREEDY)
def test_hostile_in_little_memory(source: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(BadInput):
            ChatTemplate(source).render({"messages": MESSAGES})
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("source", "message"), BROKEN.values(), ids=BROKEN)
def test_broken(source: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        ChatTemplate(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for i in range(4) %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "013"),
        ("{% for i in [1, 2] %}{{ loop.nextitem }}{{ loop.last }}{{ loop.length }}{% endfor %}", "2False2True2"),
        ("{% macro f(x) %}<{{ x }}{{ caller() }}>{% endmacro %}{% call f(1) %}y{% endcall %}", "<1y>"),
        ("{% filter upper %}{% set x = 1 %}a{{ x }}{% endfilter %}", "A1"),
        ("{% for k, v in {'a': 1}.items() %}{{ k ~ v }}{% endfor %}", "a1"),
        ("{% for c in [1] recursive %}{{ c }}{% if c < 3 %}{{ loop([c + 1]) }}{% endif %}{% endfor %}", "123"),
        ("{{ 'a' in messages[0] or 'role' in messages[0] }}", "True"),
        ("{{ messages[0].content.split('i')[0] ~ 'x'.join(['a', 'b']) }}", "haxb"),
        ("{{ [3, 1, 2]|sort|join('-') }}{{ {'b': 1}|dictsort }}", "1-2-3[('b', 1)]"),
        ("{{ '%02d' % 7 }}{{ '%s'|format('x') }}{{ 7 // 2 }}{{ 2 ** 5 }}{{ '{}{:>3}'.format(1, 2) }}", "07x3321  2"),
        ("{{ {'a': ['é', '<']}|tojson }}", '{"a": ["é", "<"]}'),
        ("{{ {'a': [1]}|tojson(indent=2) }}", '{\n  "a": [\n    1\n  ]\n}'),
        ("{{ cycler('a', 'b').next() }}{{ dict(a=1).a }}{{ strftime_now('%Y')|length }}", "a14"),
        ("{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ x is defined }}", "2False"),
    ],
)  # fmt: skip
def test_what_templates_do_every_day(source: str, text: str) -> None:
    assert ChatTemplate(source).render({"messages": MESSAGES}) == text


def test_a_long_conversation_is_within_the_budget() -> None:
    source = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content|length %}"
        "{% if m.content.startswith('<') or '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}"
        "{% elif loop.index0 == messages|length - 1 %}{{ m.content|trim }}{% endif %}"
        "{{ m.role }}: {{ m.content }}{% endfor %}{{ ns.n }}"
    )  # fmt: skip
    messages = [{"role": "user", "content": "word " * 50}] * 2000
    assert ChatTemplate(source).render({"messages": messages}).endswith("500000")
    messages = [{"role": "user", "content": "word " * 400_000}]
    assert ChatTemplate(source).render({"messages": messages}).endswith("2000000")
