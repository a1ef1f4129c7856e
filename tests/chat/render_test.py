"""Chat templates of known models (unpacked by third_party/install.sh), and some of our own, rendered by server/chat_template
and by Jinja2 with what transformers adds to it: the same bytes, or refused by both.

Where a template fails on a list of parts or prints it as Python would, the server's rule is one text; the same for null
as an assistant's content. render_test.py -v prints the first difference of each template.
"""

import collections
import datetime
import functools
import json
import os
import pathlib
import subprocess
import sys

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}

# ---- transformers' environment (utils/chat_template_utils.py)


class Generation(jinja2.ext.Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def environment():
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                        extensions=[Generation, jinja2.ext.loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


ENVIRONMENT = environment()


@functools.lru_cache(maxsize=None)
def compiled(template):
    return ENVIRONMENT.from_string(template)


# ---- Conversations: name -> (messages, tools, add_generation_prompt, template_kwargs)

WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "Weather at a place, \"now\" or later. Größe <&>",
    "parameters": {"type": "object", "required": ["city"], "properties": {
        "city": {"type": "string", "description": "e.g. 東京"},
        "days": {"type": "integer", "default": 1, "minimum": 0, "maximum": 14},
        "factor": {"type": "number", "default": 1.0, "minimum": 0.00001, "maximum": 12345678.9,
                   "examples": [1e16, 1e22, -2.5e-7, 0.1, 3.0, 123456789012345680.0]},
        "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
        "exact": {"type": "boolean", "default": False}, "note": {"type": ["string", "null"], "default": None},
        "places": {"type": "array", "items": {"type": "object", "properties": {"lat": {"type": "number"}}}}}}}}
TIME = {"type": "function", "function": {"name": "get_time", "description": "The time",
                                         "parameters": {"type": "object", "properties": {}}}}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(name, arguments, number=1):
    return {"id": f"call{number:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text, number=1, name="get_weather"):
    return {"role": "tool", "tool_call_id": f"call{number:05d}", "name": name, "content": text}


SYSTEM = {"role": "system", "content": "You are terse.  "}
CONVERSATIONS = {
    "one": ([user("Hello")], None, True, {}),
    "system": ([SYSTEM, user(" Hello\n")], None, True, {}),
    "turns": ([SYSTEM, user("One?"), assistant("  Two.\n"), user("Three?"), assistant("Four."), user("Five?")],
              None, True, {}),
    "no generation": ([user("Hi"), assistant("Hello!"), user("Bye"), assistant("Bye.")], None, False, {}),
    "unicode": ([SYSTEM, user("Grüße, 東京 🐉 \u00a0é\u3000"), assistant("\u2003naïve \"quoted\" 'text' \\ <b>&</b>\t"),
                 user("{{ x }} {% if %} 'a' \"b\" \\n </think> <think>")], None, True, {}),
    "tools": ([SYSTEM, user("Weather?")], [WEATHER, TIME], True, {}),
    "tool calls": ([SYSTEM, user("Weather in Rome?"),
                    assistant("", tool_calls=[call("get_weather", {"city": "Rome", "days": 2, "factor": 1.0,
                                                                   "exact": True, "tags": ["a", 'b"c'], "sub": {"x": 0.5}})]),
                    result('{"t": 21.5}'), assistant("21.5 C."), user("Thanks")], [WEATHER], True, {}),
    "null content": ([user("Weather?"), assistant(None, tool_calls=[call("get_weather", {"city": "Rome"}),
                                                                    call("get_time", {}, 2)]),
                      result("sunny"), result("12:00", 2, "get_time")], [WEATHER, TIME], True, {}),
    "null argument": ([user("?"), assistant("Let me see.", tool_calls=[call("get_weather", {
        "city": None, "list": [None, True, 1.5, "it's"], "deep": {"a": {"b": None}}})]), result("none")],
                      [WEATHER], True, {}),
    "parts": ([{"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
               user([{"type": "text", "text": "First."}, {"type": "text", "text": "Second."}]),
               assistant([{"type": "text", "text": "Yes."}]), user([{"type": "text", "text": "Third."}])], None, True, {}),
    "thinking": ([user("2+2?"), assistant("<think>\neasy\n</think>\n\n4", reasoning_content="easy"), user("3+3?"),
                  assistant("6", reasoning_content="hm"), user("and?")], None, True, {"enable_thinking": False}),
    "bad order": ([user("One"), user("Two"), assistant("Three"), assistant("Four"), SYSTEM], None, True, {}),
}

# ---- Our own templates: what the known ones use little of

OWN = {
    "floats": "{{ [1.0, 0.1, 1e0, 100000.0 * 100000.0 * 1000000.0, 1.5] | tojson }} {{ 2.0 }} {{ 1 / 3 }} {{ 7 % 3 }}",
    "values": "{{ none }}|{{ true }}|{{ [1, 'a', none, 2.0, {'k': \"it's\"}] }}|{{ (1, 2) }}|{{ {} }}|{{ undefined_name }}|"
              "{{ ['\\n', '\\\\', 'é'] }}|{{ 'a' ~ none ~ 1 ~ 1.0 ~ [1] }}",
    "break": "{% for m in messages %}{% if m.role == 'user' %}A{{ loop.index }}{% if loop.index0 > 1 %}B{% break %}{% endif %}"
             "C{% else %}D{% continue %}{% endif %}E{% endfor %}Z",
    "break else": "{% for i in range(5) %}{{ i }}{% if i == 0 %}x{% break %}{% endif %}{% else %}none{% endfor %}",
    "continue else": "{% for i in range(3) %}{% continue %}{% else %}none{% endfor %}",
    "white space": "a {% if true %} b {% endif %} c\n  {% if true %}\n  d\n  {%- endif -%}  \n e {# c #}\n  {# c #}\nf\n\n",
    "strings": "{% for m in messages %}{% if m.content is string %}{{ m.content | trim }}|{{ m.content | length }}|"
               "{{ m.content[1:4] }}|{{ m.content[-3:] }}|{{ m.content[::-1] }}|{{ m.content[0] }}|{{ m.content[-1] }}|"
               "{{ m.content.split() }}|{{ m.content.split('e', 1) }}|{{ m.content.replace('e', 'ee') }}|"
               "{{ m.content.lstrip('H ') }}|{{ m.content | lower }}|{{ m.content | capitalize }}|"
               "{{ m.content | replace('e', 'E', 1) }}|{{ m.content.startswith('H') }}|{{ m.content | indent(2) }}|"
               "{{ m.content.strip() | title }}{% endif %}\n{% endfor %}",
    "filters": "{{ [3, 1, 2] | sort | join(',') }} {{ ['b', 'A', 'c'] | sort }} {{ {'b': 1, 'a': 2} | dictsort }} "
               "{{ messages | map(attribute='role') | list }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }} "
               "{{ [1, 2, 3] | sum }} {{ none | default('x') }} {{ undefined_name | default('y') }} {{ '' | default('z', true) }} "
               "{{ 'a,b' | replace(',', ';') }} {{ [1, [2]] | string }} {{ 5 | string ~ 'a' }} "
               "{{ {'a': 1}.get('b') }} {{ {'length': 3}.length }} {{ {'a': 1} | length }} "
               "{{ [1, 2] | first }} {{ [1, 2] | last }} {{ -3 | abs }} {{ '7' | int + 1 }} {{ 3.7 | int }}",
    "safe": "{{ ('<' | safe) + '&' + 'x' }} {{ 'a' ~ ('<b>' | safe) ~ '\"' }} {{ '<' ~ '&' }}",
    "scopes": "{% set n = namespace(a=1) %}{% set x = 1 %}{% for i in range(3) %}{% set x = i %}{% set n.a = n.a + i %}{% endfor %}"
              "{% for i in range(3) %}{{ x }}{% set x = i %}{% endfor %}{{ x }} {{ n.a }}{% macro f(a, b=2) %}{{ a }}-{{ b }}-{{ x }}{% endmacro %} {{ f(1) }} {{ f(1, b=3) }} {{ f(b=4) }} {{ f() }}"
              "{% set y %}block {{ x }}{% endset %} {{ y }}{% filter upper %}up{% endfilter %}"
              "{% macro g() %}[{{ caller() }}]{% endmacro %}{% call g() %}c{% endcall %}",
    "operators": "{{ 1 + 2 * 3 }} {{ -7 % 3 }} {{ 'a' < 'b' }} "
                 "{{ not 1 == 2 }} {{ 1 if none else 2 }} {{ 'x' if false }} {{ [1] + [2] }} {{ 'ab' * 2 }} "
                 "{{ 'a' in 'abc' }} {{ 1 in [1] }} {{ 'k' in {'k': 1} }} {{ 'a' not in ['b'] }} {{ 1 == 1.0 }} {{ true == 1 }} "
                 "{{ (1, 2) == (1, 2) }} {{ [1] == [1] }} {{ {'a': 1} == {'a': 1} }} {{ -2 }} {{ +3 }} {{ 6 / 3 }}",
    "undefined chain": "{{ messages[0].a.b }}",
    "undefined sum": "{{ messages[0].a + 'x' }}",
    "none sum": "{{ none + 'x' }}",
    "number sum": "{{ 'x' + 1 }}",
    "list sum": "{{ [1] + 'x' }}",
    "append": "{% set l = [] %}{{ l.append(1) }}{{ l }}",
    "unknown filter": "{{ 'x' | nonsense }}",
    "unknown statement": "{% nonsense %}",
    "raise": "{{ raise_exception('No: ' ~ messages[0].role) }}",
    "json": "{{ messages | tojson }}\n{{ messages | tojson(indent=2) }}\n{{ messages[0] | tojson(separators=(',', ':')) }}\n"
            "{{ tools | tojson(indent=4) }}{{ messages | tojson(ensure_ascii=true) }}",
    "loop": "{% for m in messages %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}"
            "{{ loop.previtem.role if loop.previtem is defined }}{{ loop.nextitem.role if not loop.last }} {% endfor %}"
            "{% for k, v in {'a': 1, 'b': [2]}.items() %}{{ k }}={{ v }};{% endfor %}{% for k in {'a': 1} %}{{ k }}{% endfor %}"
            "{% for i in [1, 2, 3, 4] if i is even %}{{ i }}{{ loop.last }}{% else %}no{% endfor %}{% for c in 'héy' %}{{ c }}.{% endfor %}",
}


def render(template, case, messages):
    """The text, or None where Jinja2 refuses."""
    _, tools, generate, kwargs = case
    try:
        return compiled(template).render(messages=messages, tools=tools, documents=None, add_generation_prompt=generate,
                                         **SPECIAL, **kwargs)
    except Exception:  # whatever a template makes Python raise
        return None


def joined(message):
    return {**message, "content": "\n".join(part["text"] for part in message["content"])}


def expected(template, case):
    messages = case[0]
    text = render(template, case, messages)
    if any(isinstance(m["content"], list) for m in messages):
        for roles in ({"system"}, {"system", "assistant"}, {"system", "assistant", "user"}):
            if text is not None and "'text'" not in text and '"text"' not in text and all(
                    part["text"] in text for m in messages if isinstance(m["content"], list) for part in m["content"]):
                break
            text = render(template, case, [joined(m) if m["role"] in roles else m for m in messages])
    if any(m["content"] is None for m in messages) and (text is None or "None" in text):
        return render(template, case, [{**m, "content": m["content"] or ""} for m in messages])
    return text


def main():
    folder = pathlib.Path(os.environ["TEMPLATES"])
    templates = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}
    assert len(templates) == 70, f"{len(templates)} templates in {folder}, expected 70: third_party/install.sh unpacks them"
    known = len(templates)
    templates.update({f"own: {name}": text for name, text in OWN.items()})
    cases = [(name, title) for name in templates for title in CONVERSATIONS]
    requests = "".join(json.dumps({"template": templates[name], "config": SPECIAL, "messages": CONVERSATIONS[title][0],
                                   "tools": CONVERSATIONS[title][1], "add_generation_prompt": CONVERSATIONS[title][2],
                                   "template_kwargs": CONVERSATIONS[title][3]}) + "\n" for name, title in cases)
    run = subprocess.run([os.environ["RENDER"]], input=requests, capture_output=True, text=True, check=True, timeout=300)
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(answers) == len(cases)
    counts = {True: collections.Counter(), False: collections.Counter()}
    shown = set()
    for (name, title), answer in zip(cases, answers):
        wanted, got = expected(templates[name], CONVERSATIONS[title]), answer.get("text")
        if wanted == got:
            outcome = "refused by both" if got is None else "equal"
        elif wanted is None:
            outcome = "refused by Jinja2 only"
        else:
            outcome = "refused by us only" if got is None else "differ"
        counts[name.startswith("own")][outcome] += 1
        if outcome in ("equal", "refused by both"):
            continue
        print(f"{outcome}: {name}, {title}: {answer.get('error', '')}")
        if "-v" in sys.argv and name not in shown and got is not None:
            shown.add(name)
            print(f"  jinja2: {wanted!r}\n  ours:   {got!r}")
    print(f"{known} known templates: {sum(counts[False].values())} cases, {dict(counts[False])}")
    print(f"{len(OWN)} of our own: {sum(counts[True].values())} cases, {dict(counts[True])}")
    both = counts[True] + counts[False]
    sys.exit(1 if both["differ"] or both["refused by us only"] else 0)


if __name__ == "__main__":
    main()
