"""Hostile templates fail with one line, quickly and with little memory; ordinary templates render."""

import tracemalloc

import pytest

from pentad.errors import BadInput
from pentad.text.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "hi"}]
WORK = "work limit is exceeded"


def loops(body: str, condition: str = "true") -> str:
    """A template that runs `body` a million times."""
    inner = f"{{% for b in range(999) if {condition} %}}{body}{{% endfor %}}"
    return f"{{% for a in range(999) %}}{inner}{{% endfor %}}"


def grows(start: str, step: str, use: str = "") -> str:
    """A template that doubles a value 99 times."""
    loop = f"{{% for i in range(99) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
    return f"{{% set ns = namespace(x={start}) %}}{loop}{use}"


def nested(use: str) -> str:
    """A template that nests a tuple twice in a new tuple, 99 times."""
    return grows("(1,)", "(ns.x, ns.x)", use)


ALMOST_EQUAL = "{% set x = 'a' * 99999 %}{% set y = 'a' * 99998 ~ 'b' %}"
HOSTILE = {
    "attribute": ("{{ ''.__class__.__mro__ }}", "__class__"),
    "attr filter": ("{{ ''|attr('__class__') }}", "__class__"),
    "globals": ("{{ raise_exception.__globals__ }}", "__globals__"),
    "context": ("{{ self._TemplateReference__context }}", "unsafe"),
    "changing messages": ("{{ messages.append(1) }}", "append"),
    "format's fields": ("{{ '{0.__class__}'.format(1) }}", "__class__"),
    "include": ("{% include 'x' %}", "loader"),
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
    "branching macro": ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(50) }}", WORK),
    "recursive block": ("{% block a %}{{ self.a() }}{% endblock %}", "recursion"),
    "a filter that is not jinja's": ("{{ [1]|map('charge', -10**15)|list }}" + loops(""), "charge"),
    "charging by hand": ("{{ environment.charge(-10**15) }}" + loops(""), "environment"),
    "loop of long comparisons": (ALMOST_EQUAL + loops("{{ x == y }}"), WORK),
    "loop of slices": (ALMOST_EQUAL + loops("{% set z = x[1:] %}"), WORK),
    "loop of long argument lists": (
        "{% set r = range(60000)|list %}{% macro f() %}{{ varargs|length }}{% endmacro %}" + loops("{{ f(*r) }}"),
        WORK,
    ),
    "macro with long defaults": ("{% macro f(a=[" + "1, " * 9999 + "x]) %}{% endmacro %}" + loops("{{ f() }}"), WORK),
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
    "a namespace in itself": ("{% set ns = namespace() %}{% set ns.x = [ns, ns] %}{{ ns }}", WORK),
    "nested, as text": (nested("{{ ns.x|upper }}"), WORK),
    "nested, as safe text": (nested("{{ ns.x|safe }}"), WORK),
    "nested, tested": (nested("{{ ns.x is lower }}"), WORK),
    "nested, hashed by a test": (nested("{{ ns.x is filter }}"), WORK),
    "nested, hashed by a filter": (nested("{{ [ns.x]|select|unique|list }}"), WORK),
    "nested, looked for": (nested("{{ ns.x in {} }}"), WORK),
    "nested, in a message about it": (nested("{{ ({}[ns.x]).y }}"), WORK),
    "nested, hashed by a function": (nested("{{ dict([[ns.x, 1]]|select) }}"), WORK),
    "nested, in an iterator": (nested("{{ 1 in [ns.x]|select }}"), WORK),
    "nested twice, sorted": (nested("{% set a = ns.x %}") + nested("{{ [a, ns.x]|select|sort }}"), WORK),
    "deep": (
        "{% set ns = namespace(x=(1,)) %}{% for i in range(900) %}{% set ns.x = (ns.x,) %}{% endfor %}{{ {ns.x: 1} }}",
        "nested",
    ),
    "integers": (grows("3", "ns.x * ns.x", ""), "too large"),
    "integer of many digits": ("{{ 0x" + "f" * 9999 + " is odd }}", "too large"),
    "power": ("{{ 9 ** 999999999 }}", "too large"),
    "round": ("{{ 1|round(999999999) }}", WORK),
    "round up": ("{{ 1|round(-999999999, 'ceil') }}", WORK),
    "round text": ("{{ 'a'|round(9, 'ceil') }}", "number"),
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
    "format, filled": ("{{ '{:a<999999999}'.format(1) }}", "too wide"),
    "format, precise": ("{{ '{:.999999999f}'.format(1.5) }}", "too wide"),
    "format, in other digits": ("{{ '{:٩٩٩٩٩٩٩٩٩}'.format(1) }}", "too wide"),
    "format of many fields": ("{{ ('{0:999}' * 250000).format(1) }}", WORK),
    "format by its own values": ("{{ '{:{w}}'.format(1, w=999999999) }}", "too wide"),
    "format of a large value": ("{{ ('{0}' * 9999).format('b' * 9999) }}", WORK),
    "format_map": ("{{ ('{a}' * 9999).format_map({'a': 'b' * 9999}) }}", WORK),
    "format filter": ("{{ '%999999999d'|format(1) }}", "too wide"),
    "% operator": ("{{ '%*d' % (999999999, 1) }}", "too wide"),
    "% of a key": ("{{ '%(a)999999999d' % {'a': 1} }}", "too wide"),
    "% of a key in parentheses": ("{{ '%(a(b)c)999999999d' % {'a(b)c': 1} }}", "too wide"),
    "% after parentheses": ("{{ (')' * 999999 ~ '%s') % ([0] * 999) }}", WORK),
    "format after colons": ("{{ (':' * 999999 ~ '{}{}').format('a' * 999999, 1) }}", WORK),
    "% in a test": ("{{ '%999999999d' is odd }}", "number"),
    "% in another test": ("{{ '%999999999d' is divisibleby 3 }}", "number"),
    "% of a large value": ("{{ ('%(a)s' * 9999) % {'a': 'b' * 9999} }}", WORK),
    "tojson": ("{{ [[1]]|tojson(indent=999999999) }}", "too wide"),
    "tojson, separated": ("{{ ([0] * 9999)|tojson(separators=('b' * 9999, ':')) }}", WORK),
    "tojson, deep": (
        "{% set ns = namespace(x=[0] * 9999) %}{% for i in range(400) %}{% set ns.x = [ns.x] %}{% endfor %}"
        "{{ ns.x|tojson(indent=16) }}",
        WORK,
    ),
    "batch": ("{{ [1]|batch(10**9, 0)|list }}", WORK),
    "slice": ("{{ [1]|slice(10**9)|list }}", WORK),
    "sum": ("{{ ([[1]] * 99)|sum(start=[]) }}", "sum expects numbers"),
    "split": ("{{ ('a,' * 999999).split(',') }}", WORK),
    "splitlines": ("{{ ('\\n' * 999999).splitlines() }}", WORK),
    "searching backwards": ("{{ ('a' * 999999).rfind('b' + 'a' * 99999) }}", WORK),
    "stripping": ("{{ ('a' * 300000).strip('!' * 300000 ~ 'a') }}", WORK),
    "trim": ("{{ ('a' * 300000)|trim('!' * 300000 ~ 'a') }}", WORK),
    "title": ("{{ ('a ' * 999999)|title }}", WORK),
    "wordcount": ("{{ ('a ' * 999999)|wordcount }}", WORK),
    "translate": ("{{ 'a'.translate({97: 'b' * 99999}) }}", "translate"),
    "striptags": ("{{ ('<!---->'|safe).striptags() }}", "striptags"),
    "integers to bytes": ("{{ (5).to_bytes(10**9) }}", "to_bytes"),
    "long attribute": ("{{ [messages]|map(attribute='0' ~ '.0' * 9999)|list }}", "attributes"),
    "list": ("{{ ('a' * 999999)|list }}", WORK),
    "sort": ("{{ range(99999)|sort }}", WORK),
    "urlencode": ("{{ ('é' * 999999)|urlencode }}", WORK),
    "strftime": ("{{ strftime_now('%999999999d') }}", "strftime"),
    "lipsum": ("{{ lipsum(n=9999) }}", "lipsum"),
    "raised, long": ("{{ raise_exception('a ' * 600000) }}", "a a a"),
    "raised": ("{{ raise_exception('not\nthis') }}", "not this"),
    "undefined": ("{{ nothing.at_all }}", "'nothing' is undefined"),
}

BROKEN = {
    "syntax": ("a\n{% if %}", "line 2: Expected an expression"),
    "unknown filter": ("{{ 1|pprint }}", "line 1: No filter named 'pprint'"),
    "unknown tag": ("{% do x %}", "unknown tag 'do'"),
    "deep": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
    "deep blocks": ("{% if 1 %}" * 200 + "{% endif %}" * 200, "chat template"),
    "deep chain": ("{{ a" + " + a" * 50_000 + " }}", "recursion"),
    "many nodes": ("{{ a" + " == a" * 50_000 + " }}", "32768"),
    "long": ("a" * 300_000, "262144"),
}


@pytest.mark.parametrize(("source", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_templates_are_refused(source: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        ChatTemplate(source).render({"messages": MESSAGES})
    assert str(error.value).startswith("chat template: ")
    assert "\n" not in str(error.value)


# Without the long loops: tracing memory would make them slow.
GREEDY = {name: source for name, (source, _) in HOSTILE.items() if "range(999)" not in source}
del GREEDY["branching macro"]


@pytest.mark.parametrize("source", GREEDY.values(), ids=GREEDY)
def test_hostile_templates_need_little_memory(source: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(BadInput):
            ChatTemplate(source).render({"messages": MESSAGES})
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("source", "message"), BROKEN.values(), ids=BROKEN)
def test_invalid_templates_are_refused(source: str, message: str) -> None:
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
        ("{{ ', '.join(messages|map(attribute='role')) }}{{ 'user' in messages|map(attribute='role') }}", "userTrue"),
        ("{{ '2024 {} %d'.format(1) % 2 }}{{ 7.5|round(1) }}{{ 'a b'|title }}{{ 4 is even }}", "2024 1 27.5A BTrue"),
        ("{% for i in [1, 2, 3] if i is odd %}{{ loop.index }}{{ i }}{% endfor %}", "1123"),
        ("{{ 'a' < 'b' < 'c' }}{{ 1 if 2 not in [1] else 0 }}{{ [1, 2, 3][::-1] }}", "True1[3, 2, 1]"),
        ("{{ messages[0].content.split('i')[0] ~ 'x'.join(['a', 'b']) }}", "haxb"),
        ("{{ [3, 1, 2]|sort|join('-') }}{{ {'b': 1}|dictsort }}", "1-2-3[('b', 1)]"),
        ("{{ '%02d' % 7 }}{{ '%s'|format('x') }}{{ 7 // 2 }}{{ 2 ** 5 }}{{ '{}{:>3}'.format(1, 2) }}", "07x3321  2"),
        ("{{ {'a': ['é', '<']}|tojson }}", '{"a": ["é", "<"]}'),
        ("{{ {'a': [1]}|tojson(indent=2) }}", '{\n  "a": [\n    1\n  ]\n}'),
        ("{{ cycler('a', 'b').next() }}{{ dict(a=1).a }}{{ strftime_now('%Y')|length }}", "a14"),
        ("{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ x is defined }}", "2False"),
    ],
)  # fmt: skip
def test_ordinary_templates(source: str, text: str) -> None:
    assert ChatTemplate(source).render({"messages": MESSAGES}) == text


def test_a_long_conversation_is_within_the_work_limit() -> None:
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
