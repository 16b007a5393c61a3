import json
from pathlib import Path

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_tokenizer import BOS, CONTROL_TOKENS, EOS, R1_0528_CHAT_TEMPLATE, make_tokenizer
from tokenizers import Tokenizer as Reference

from r1_cluster.text.reasoning import Thought
from r1_cluster.text.template import R1_CHAT_TEMPLATE, ChatTemplate, PromptTooLong, TemplateError
from r1_cluster.text.tokenizer import Tokenizer

# The template that DeepSeek publishes with the distilled models, as data: one statement a line.
PUBLISHED = (Path(__file__).parent / "published_template.jinja").read_text(encoding="utf-8")
PROMPT_END = "<｜Assistant｜><think>\n"
CALL = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}


@pytest.fixture(scope="module")
def reference(folder):
    from transformers import AutoTokenizer  # takes seconds, which others' tests need not wait for

    return AutoTokenizer.from_pretrained(folder)


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def assistant(text, *calls):
    return {"role": "assistant", "content": text} | ({"tool_calls": list(calls)} if calls else {})


def tool(text):
    return {"role": "tool", "content": text}


CONVERSATIONS = {
    "one": [user("Hello")],
    "system": [system("Be brief."), user("Grüße, 世界 🙂 12345")],
    "late system": [user("Hello"), system("Be brief.")],
    "history": [user("1+1?"), assistant("so\n</think>\n\nTwo."), user("And 2+2?")],
    "white space": [user("  a \n"), assistant(" b "), user("\n\nc\t")],
}
TOOL_CONVERSATIONS = {
    "call": [user("Time?"), assistant(None, CALL), tool("12:00"), assistant("Noon."), user("Thanks")],
    "two calls": [
        user("Time?"),
        assistant(None, CALL, CALL),
        tool("12:00"),
        tool("13:00"),
        assistant("Noon."),
    ],
}


@pytest.mark.parametrize("source", [PUBLISHED, R1_CHAT_TEMPLATE], ids=["published", "ours"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompt_is_what_transformers_makes_of_the_published_template(tokenizer, reference, source, name):
    messages = CONVERSATIONS[name]
    expected = reference.apply_chat_template(
        messages, chat_template=PUBLISHED, add_generation_prompt=True, return_dict=False
    )
    assert ChatTemplate(source, tokenizer).prompt_ids(messages) == expected


@pytest.mark.parametrize("source", [PUBLISHED, R1_CHAT_TEMPLATE], ids=["published", "ours"])
@pytest.mark.parametrize("name", TOOL_CONVERSATIONS)
def test_tool_turns_are_those_of_the_published_template(tokenizer, reference, source, name):
    messages = TOOL_CONVERSATIONS[name]  # transformers drops `content: null`, which the template asks for
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(PUBLISHED).render(
        messages=messages, bos_token=BOS, add_generation_prompt=True
    )
    if messages[-1]["role"] == "tool":
        text += "<think>\n"
    expected = reference.encode(text, add_special_tokens=False)
    assert ChatTemplate(source, tokenizer).prompt_ids(messages) == expected


texts = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        st.sampled_from([BOS, EOS, *CONTROL_TOKENS]),
    ),
    max_size=4,
).map("".join)


@pytest.mark.slow
@pytest.mark.parametrize("source", [R1_CHAT_TEMPLATE, R1_0528_CHAT_TEMPLATE], ids=["r1", "0528"])
@given(
    st.lists(
        st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), texts), min_size=1, max_size=6
    )
)
def test_text_of_messages_never_becomes_a_control_token(tokenizer, source, pairs):
    messages = [{"role": role, "content": text} for role, text in pairs]
    harmless = [{"role": role, "content": "x"} for role, _ in pairs]
    template = ChatTemplate(source, tokenizer)
    ids, plain = template.prompt_ids(messages), template.prompt_ids(harmless)
    controls = tokenizer.control_ids
    assert [i for i in ids if i in controls] == [i for i in plain if i in controls]
    assert ids[0] == tokenizer.bos_id
    for role, text in pairs:
        shown = text.split("</think>")[-1] if role == "assistant" else text
        assert tokenizer.decode(tokenizer.encode(shown)) in tokenizer.decode(ids)


def test_names_and_arguments_of_tool_calls_are_text_too(tokenizer):
    call = {"id": "</think>", "type": "function", "function": {"name": EOS, "arguments": "<｜User｜>"}}
    ids = ChatTemplate(R1_CHAT_TEMPLATE, tokenizer).prompt_ids([user("x"), assistant(None, call)])
    assert ids.count(tokenizer.token_id(EOS)) == 1
    assert ids.count(tokenizer.token_id("<｜User｜>")) == 1


def test_a_second_round_of_tool_calls_opens_like_the_first(tokenizer):
    messages = [user("a"), assistant(None, CALL), tool("b"), assistant("c", CALL), tool("d"), user("e")]
    text = tokenizer.decode(ChatTemplate(R1_CHAT_TEMPLATE, tokenizer).prompt_ids(messages))
    assert text.count("<｜Assistant｜>") == 3
    assert text.count("<｜tool▁outputs▁begin｜>") == text.count("<｜tool▁outputs▁end｜>") == 2
    assert text.endswith("d<｜tool▁output▁end｜><｜tool▁outputs▁end｜><｜User｜>e" + PROMPT_END)


def test_several_system_messages_and_developer_are_joined_by_blank_lines(tokenizer):
    messages = [system("a"), {"role": "developer", "content": "b"}, user("c")]
    assert tokenizer.decode(ChatTemplate(R1_CHAT_TEMPLATE, tokenizer).prompt_ids(messages)).startswith(
        "a\n\nb<｜User｜>c"
    )


def test_without_thinking_the_thought_is_closed_at_once(tokenizer):
    ids = ChatTemplate(PUBLISHED, tokenizer).prompt_ids([user("x")], thinking=False)
    assert tokenizer.decode(ids).endswith("<｜Assistant｜><think>\n\n</think>\n\n")
    assert ids.count(tokenizer.think_end_id) == 1


def test_text_that_cannot_fit_is_refused_untokenized(tokenizer, monkeypatch):
    template = ChatTemplate(R1_CHAT_TEMPLATE, tokenizer)
    short, long = [{"role": "user", "content": "x " * 50}], [{"role": "user", "content": "x " * 2_000_000}]
    assert template.prompt_ids(short, limit=200) == template.prompt_ids(short)
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: pytest.fail("tokenized"))
    with pytest.raises(PromptTooLong) as caught:
        template.prompt_ids(long, limit=200)
    assert caught.value.at_least > 200


def test_a_thought_of_the_history_does_not_count(tokenizer):
    messages = [
        {"role": "assistant", "content": "x " * 2_000_000 + "</think>y"},
        {"role": "user", "content": "z"},
    ]
    assert len(ChatTemplate(R1_CHAT_TEMPLATE, tokenizer).prompt_ids(messages, limit=200)) < 20


SIMPLE = "{{ bos_token }}{% for m in messages %}{{ '<｜User｜>' + m['content'] }}{% endfor %}"


@pytest.mark.parametrize("end", ["<｜Assistant｜><think>", PROMPT_END])
def test_a_thought_that_the_template_opens_is_open_in_one_way(tokenizer, end):
    template = ChatTemplate(SIMPLE + end, tokenizer)
    ids = template.prompt_ids([user("x")])
    assert tokenizer.decode(ids) == "<｜User｜>x" + PROMPT_END
    assert tokenizer.token_id("<think>") in ids
    assert template.thought(thinking=True) is Thought.OPEN
    assert template.thought(thinking=False) is Thought.CLOSED


@pytest.mark.parametrize(
    "source", [SIMPLE + "<｜Assistant｜>", R1_0528_CHAT_TEMPLATE], ids=["simple", "0528"]
)
@pytest.mark.parametrize("text", ["x", "<think>", "</think>", "a\n<think>\n"])
def test_a_template_that_opens_no_thought_leaves_it_to_the_model(tokenizer, source, text):
    template = ChatTemplate(source, tokenizer)
    ids = template.prompt_ids([user(text)])
    assert tokenizer.decode(ids) == f"<｜User｜>{text}<｜Assistant｜>"
    assert not {tokenizer.think_start_id, tokenizer.think_end_id} & set(ids)
    assert template.thought(thinking=True) is Thought.UNDECIDED
    closed = template.prompt_ids([user(text)], thinking=False)
    assert closed[: len(ids)] == ids
    assert tokenizer.decode(closed[len(ids) :]) == "<think>\n\n</think>\n\n"
    assert template.thought(thinking=False) is Thought.CLOSED


R1_0528_PROMPTS = {
    "one": ([user("a")], "<｜User｜>a<｜Assistant｜>"),
    "systems": (
        [system("a"), user("b"), {"role": "developer", "content": "c"}],
        "a\n\nc<｜User｜>b<｜Assistant｜>",
    ),
    "history": (
        [user("a"), assistant("so\n</think>\n\nb"), user("c")],
        f"<｜User｜>a<｜Assistant｜>\n\nb{EOS}<｜User｜>c<｜Assistant｜>",
    ),
    "behind an answer": ([user("a"), assistant("b")], f"<｜User｜>a<｜Assistant｜>b{EOS}<｜Assistant｜>"),
    "behind a system text": ([system("a")], "a<｜Assistant｜>"),
    "tools": (
        [user("a"), assistant(None, CALL, CALL), tool("12"), tool("13"), assistant("b"), user("c")],
        "<｜User｜>a<｜Assistant｜><｜tool▁calls▁begin｜>"
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{"zone": "UTC"}\n```<｜tool▁call▁end｜>\n'
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{"zone": "UTC"}\n```<｜tool▁call▁end｜>'
        f"<｜tool▁calls▁end｜>{EOS}"
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>12<｜tool▁output▁end｜>\n"
        "<｜tool▁output▁begin｜>13<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
        f"b{EOS}<｜User｜>c<｜Assistant｜>",
    ),
    "a call beside text": (
        [user("a"), assistant("b", CALL), tool("12")],
        "<｜User｜>a<｜Assistant｜>b<｜tool▁calls▁begin｜>"
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{"zone": "UTC"}\n```<｜tool▁call▁end｜>'
        f"<｜tool▁calls▁end｜>{EOS}"
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>12<｜tool▁output▁end｜><｜tool▁outputs▁end｜>",
    ),
}


@pytest.mark.parametrize("name", R1_0528_PROMPTS)
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3"])
def test_prompts_of_r1_0528(tmp_path_factory, family, name):
    """By the published template's description, and as transformers renders the same template."""
    folder = tmp_path_factory.mktemp(family)
    make_tokenizer(folder, family, template="r1-0528")
    tokenizer = Tokenizer.from_folder(folder)
    messages, expected = R1_0528_PROMPTS[name]
    ids = ChatTemplate.from_folder(folder, tokenizer).prompt_ids(messages)
    assert (
        ids
        == Reference.from_file(str(folder / "tokenizer.json"))
        .encode(BOS + expected, add_special_tokens=False)
        .ids
    )
    from transformers import AutoTokenizer

    known = [
        m | {"role": "system"} if m["role"] == "developer" else m | {"content": m["content"] or ""}
        for m in messages
    ]
    assert ids == AutoTokenizer.from_pretrained(folder).apply_chat_template(
        known, add_generation_prompt=True, return_dict=False
    )


def test_r1s_thought_is_open_behind_a_tools_output_too(tokenizer):
    messages = [user("Time?"), assistant(None, CALL), tool("12:00")]
    for source in (PUBLISHED, R1_CHAT_TEMPLATE):
        text = tokenizer.decode(ChatTemplate(source, tokenizer).prompt_ids(messages))
        assert text.endswith("12:00<｜tool▁output▁end｜><｜tool▁outputs▁end｜><think>\n")


@pytest.mark.parametrize("takes_null", [True, False])
def test_a_turn_of_calls_alone_has_the_content_that_the_template_takes(tokenizer, takes_null):
    said = "{{ m.content is none }}" if takes_null else "{{ 'x' in m.content }}"
    source = "{% for m in messages %}" + said + "{% endfor %}"
    text = tokenizer.decode(ChatTemplate(source, tokenizer).prompt_ids([user("x"), assistant(None, CALL)]))
    assert text == ("FalseTrue" if takes_null else "TrueFalse")


@pytest.mark.parametrize("start", ["", "{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"])
def test_bos_stands_there_exactly_once(tokenizer, start):
    ids = ChatTemplate(start + "{{ messages[0].content }}", tokenizer).prompt_ids([user(BOS)])
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.bos_id not in ids[1:]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("c | trim", "<think> a"),
        ("c.strip() | upper", "<THINK> A"),
        ("c | replace('a', 'b')", "  <think> b\n"),
        ("c[2:5] ~ '!' ~ c | length", "<th!12"),
        ("'yes' if '<think>' in c else 'no'", "yes"),
        ("(c.split('>') | last) + '|'", " a\n|"),
        ("'%s' % c", "  <think> a\n"),
        ("[c, c] | join('+')", "  <think> a\n+  <think> a\n"),
        ("'empty' if c == '' else c.lstrip()", "<think> a\n"),
    ],
)
def test_templates_may_work_on_text_which_stays_text(tokenizer, expression, expected):
    template = ChatTemplate("{% set c = messages[0].content %}{{ " + expression + " }}", tokenizer)
    ids = template.prompt_ids([user("  <think> a\n")])
    assert ids[1:] == tokenizer.encode(expected)


@pytest.mark.parametrize(
    "expression", ["(c ~ ' ') | trim", "c | tojson", "c | list | join('-')", "c | title", "c.encode()"]
)
def test_work_on_text_that_cannot_be_followed_is_refused(tokenizer, expression):
    template = ChatTemplate("{% set c = messages[0].content %}{{ " + expression + " }}", tokenizer)
    with pytest.raises(TemplateError, match="not supported"):
        template.prompt_ids([user("  don't <think> \n")])


def test_a_templates_refusal_reaches_the_client(tokenizer):
    refusal = "{{ raise_exception('roles must alternate') }}"
    template = ChatTemplate("{% if messages | length > 1 %}" + refusal + "{% endif %}", tokenizer)
    with pytest.raises(TemplateError, match="roles must alternate"):
        template.prompt_ids([user("x"), user("y")])
    with pytest.raises(TemplateError, match="roles must alternate"):
        ChatTemplate(refusal, tokenizer)  # nothing can be asked through it


@pytest.mark.parametrize("expression", ["''.__class__", "messages.append(1)", "c._raw", "c._book"])
def test_the_sandbox_holds(tokenizer, expression):
    source = "{% set c = messages[0].content %}[{{ " + expression + " }}]"
    try:
        ids = ChatTemplate(source, tokenizer).prompt_ids([user("secret")])
    except TemplateError:
        return
    assert tokenizer.decode(ids) == "[]"


def test_broken_templates_are_refused_at_once(tokenizer):
    with pytest.raises(TemplateError, match="broken"):
        ChatTemplate("{% for %}", tokenizer)


def test_where_the_template_is_looked_for(tmp_path, tokenizer):
    def text():
        return tokenizer.decode(ChatTemplate.from_folder(tmp_path, tokenizer).prompt_ids([user("x")]))

    config = tmp_path / "tokenizer_config.json"
    assert text() == "<｜User｜>x" + PROMPT_END
    config.write_text(json.dumps({"chat_template": "config"}))
    assert text() == "config"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert text() == "named"
    for broken in ([{"name": "tool_use", "template": "tools"}], [], ["x"], 7, {"default": "x"}):
        config.write_text(json.dumps({"chat_template": broken}))
        with pytest.raises(TemplateError, match="neither a text nor a list with one named default"):
            text()
    (tmp_path / "chat_template.jinja").write_text("file")
    assert text() == "file"
    (tmp_path / "chat_template.jinja").write_bytes(b"file\xff")
    with pytest.raises(TemplateError, match=r"chat_template\.jinja cannot be read"):
        text()


@pytest.mark.parametrize(
    "source",
    ["{{ 1 / 0 }}", "{{ none + 'x' }}", "{{ messages[9].content.x }}", "{{ 'x' | int('y') % 's' }}",
     "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 10.0 ** 400 }}"],
)  # fmt: skip
def test_a_template_that_fails_is_refused_at_once(tokenizer, source):
    with pytest.raises(TemplateError):
        ChatTemplate(source, tokenizer)
