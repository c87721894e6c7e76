"""Rendering: input rows become requests; bad rows become dead letters with a reason."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bidbeam.connectors.errors import ConfigError, InputError, ModelError
from bidbeam.connectors.input_parts import JSON_MARK
from bidbeam.connectors.inputs import plan_input, read_split
from bidbeam.connectors.template_sandbox import LimitedSandbox
from bidbeam.connectors.tokenizer import ModelTools
from bidbeam.transforms.rendering import (
    RENDERED,
    PromptSpec,
    RenderSpec,
    check_columns,
    compile_template,
    messages_json,
    prompt_text,
    render,
    token_lists,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def spec(prompt: PromptSpec | None = None, **changes: Any) -> RenderSpec:
    """A job with one model, greedy, eight tokens an answer."""
    values: dict[str, Any] = {
        "model": "small", "sampling": {"max_tokens": 8, "temperature": 0}, "placement": {}, "longest_context": {},
    }  # fmt: skip
    return RenderSpec(prompt=prompt or PromptSpec(), **{**values, **changes})


def rendered(
    table: pa.Table, job: RenderSpec | None = None, models: Mapping[str, ModelTools | None] | None = None, seed: int = 1
) -> list[dict[str, Any]]:
    """The table's rows as requests, as Python rows."""
    batch = render(table, job or spec(), models or {"small": None}, file="in.parquet", row_start=10, seed=seed)
    assert batch.schema == RENDERED
    assert batch.num_rows == table.num_rows
    batch.validate(full=True)
    rows: list[dict[str, Any]] = batch.to_pylist()
    for row in rows:
        assert (row["reason"] is None) == (row["message"] is None) == (row["key"] is not None)
        assert (row["content"] is None) == (row["key"] is None)
    return rows


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> ModelTools:
    """A small byte-level tokenizer with a ChatML template."""
    directory = tmp_path_factory.mktemp("small")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 20, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": 64, "eos_token_id": 1}))
    (directory / "chat_template.jinja").write_text(CHATML)
    return ModelTools(str(directory))


def test_a_plain_prompt_is_its_own_key() -> None:
    """Without a tokenizer a text prompt's key is its bytes, its tokens an estimate, and its text is not repeated."""
    row = rendered(pa.table({"prompt": ["Grüße"], "request_id": [7]}), spec(PromptSpec(id="request_id")))[0]
    assert row["request_id"] == "7"
    assert row["key"] == "Grüße".encode()
    assert (row["key_width"], row["tokens_exact"], row["text"]) == (1, False, None)
    assert row["sampling"] == '{"max_tokens":8,"temperature":0}'
    assert (row["max_tokens"], row["n"], row["greedy"], row["model"]) == (8, 1, True, "small")


def test_rows_without_an_id_are_named_by_file_and_row() -> None:
    """No id column, or a null in it, leaves file and row."""
    table = pa.table({"prompt": ["a", "b"], "id": ["x", None]})
    assert [r["request_id"] for r in rendered(table)] == ["in.parquet:10", "in.parquet:11"]
    assert [r["request_id"] for r in rendered(table, spec(PromptSpec(id="id")))] == ["x", "in.parquet:11"]


@pytest.mark.parametrize(
    "type_", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()), pa.binary()]
)
def test_every_arrow_text_is_a_prompt(type_: pa.DataType) -> None:
    """Strings of any width or encoding render alike, sliced ones included."""
    array = pa.array(["zero", "one", "two"], pa.string()).cast(type_).slice(1)
    assert [r["key"] for r in rendered(pa.table({"prompt": array}))] == [b"one", b"two"]


def test_null_empty_and_broken_prompts_are_invalid() -> None:
    """A prompt that is null, empty or not UTF-8 is a dead letter that names the column, and its neighbours are not."""
    array = pa.array([b"fine", None, b"", b"\xff\xfe", b"good"], pa.binary()).view(pa.string())
    rows = rendered(pa.table({"prompt": array}))
    assert [r["reason"] for r in rows] == [None, "invalid", "invalid", "invalid", None]
    assert all("'prompt'" in r["message"] for r in rows[1:4])
    assert "UTF-8" in rows[3]["message"]


def test_messages_render_with_the_jobs_system_message_first() -> None:
    """Messages columns become chats; a row's own system message stands, else the job's is put first."""
    table = pa.table(
        {
            "prompt": [
                [{"role": "user", "content": "hi"}],
                [{"role": "system", "content": "mine"}, {"role": "user", "content": "hi"}],
                [{"role": "owner", "content": "hi"}],
                [],
                None,
                [{"role": "user", "content": None}],
            ]
        }
    )
    job = spec(PromptSpec(system="ours"))
    rows = rendered(table, job)
    assert [r["reason"] for r in rows] == [None, None, "invalid", "invalid", "invalid", "invalid"]
    assert "message 1 has an unknown role" in rows[2]["message"]
    sent = messages_json(table.slice(0, 2), job).to_pylist()
    assert [m["content"] for m in json.loads(sent[0])] == ["ours", "hi"]
    assert [m["content"] for m in json.loads(sent[1])] == ["mine", "hi"]
    assert prompt_text(table.slice(0, 2), job).to_pylist() == [None, None]


def test_a_template_sees_the_rows_columns() -> None:
    """A template renders row by row; its text is kept, because no column holds it."""
    table = pa.table({"title": ["Red shoe", None, ""], "tags": [["a", "b"], [], ["c"]], "text": ["x", "y", "z"]})
    job = spec(PromptSpec(template="{{ title }}{% for t in tags %} {{ t }}{% endfor %}", system="s"))
    check_columns(job, table.schema)
    rows = rendered(table, job)
    assert [r["text"] for r in rows] == ["Red shoe a b", None, " c"]
    assert rows[1]["reason"] == "invalid"
    assert "title" in rows[1]["message"]
    batch = render(table, job, {"small": None}, file="f", row_start=0, seed=1)
    both = pa.Table.from_arrays([*table.columns, *batch.columns], names=[*table.column_names, *RENDERED.names])
    assert json.loads(messages_json(both, job)[0].as_py())[1] == {"role": "user", "content": "Red shoe a b"}


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 100000000 }}{{ a }}", "{% for i in range(10000000) %}{{ a }}{% endfor %}",
        "{{ 10 ** 100000 }}{{ a }}",
        "{% for i in range(9999) %}{% for j in range(9999) %}{{ a }}{% endfor %}{% endfor %}",
        "{{ '%1000000000d' % 1 }}{{ a }}", "{{ '{:>1000000000}'.format(a) }}", "{{ a.ljust(1000000000) }}",
        "{{ a | center(1000000000) }}", "{{ a.__class__.__mro__ }}", "{{ a.no_such }}", "{{ 1 / 0 }}{{ a }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}{{ a }}",
        "{% set n = namespace(x=a) %}{% for i in range(90) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=a) %}{% for i in range(90) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=a) %}{% for i in range(90) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
        "{% set n = namespace(x=[a]) %}{% for i in range(90) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=[a]) %}{% for i in range(90) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x == [a] }}",
        "{% set n = namespace(x=(a,)) %}{% for i in range(90) %}{% set n.x = (n.x, n.x) %}{% endfor %}{{ {n.x: 1} }}",
        "{{ a | slice(10 ** 9) | list }}", "{{ a | batch(10 ** 9, a) | list }}",
        "{{ (a * 100000) | wordwrap(1, True, a * 100000) }}", "{{ ('a\n' * 1000000) | indent(a * 100000) }}",
        "{{ (a * 100000) | replace('s', a * 100000) }}", "{{ (a * 100000).replace('s', a * 100000) }}",
        "{{ (a * 100000) | join(a * 100000) }}", "{{ (a * 100000).join(a * 100000) }}",
        "{{ a }}{{ 1.5 | round(10 ** 9, 'ceil') }}", "{{ [[a]] | tojson(10 ** 9) }}",
        "{{ ('{0}' * 10000).format(a * 100000) }}", "{{ ('%(a)s' * 10000) % {'a': a * 100000} }}",
        "{{ (a * 100000).translate({115: a * 100000}) }}", "{{ [[a]] | sum(start=[]) }}", "{{ a }}{{ '%.99999f' % 1 }}",
        "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ a ~ n.x % 7 }}",
        "{{ a }}{{ (1).from_bytes('a'.encode() * 1000000, 'little') % 7 }}",
        "{% set t = a * 100000 %}{% for i in range(900) %}{{ t.count('zz') }}{% endfor %}",
        "{% set t = 's' * 1000000 %}{% for i in range(900) %}{{ a if t.isalpha() }}{% endfor %}",
        "{% macro m0() %}{{ a }}{% endmacro %}"
        + "".join(f"{{% macro m{i}() %}}{{{{ m{i - 1}() ~ m{i - 1}() }}}}{{% endmacro %}}" for i in range(1, 40))
        + "{{ m39() }}",
    ],
)  # fmt: skip
def test_a_template_cannot_run_away(template: str) -> None:
    """Bombs and sandbox escapes end as dead letters of their rows, which say nothing of the row's values."""
    row = rendered(pa.table({"a": ["secret-value"]}), spec(PromptSpec(template=template)))[0]
    assert row["reason"] == "invalid"
    assert "secret-value" not in row["message"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ [a, 'x'] | join(' - ') | replace('s', 'ss') | indent(2) | wordwrap(5) | title }}",
        "{{ a ~ b ~ none_ ~ 1.5 }}",
        "{{ (b | batch(2, 0) | list, b | slice(2) | list, b | sum, b | map('string') | join) }}",
        "{{ undef | join | string }}",
        "{{ '%s-%05d %(x)s' | replace('%(x)s', '') | format(a, 3) }}{{ '{:>5}|{}'.format(a, b) }}",
        "{{ b | tojson(2) }}",
        "{% for x in b if x is odd %}{{ loop.index }}{{ loop.last }}{{ x in b and x == 1 or x > 2 }}{% endfor %}",
        "{% set t %}{{ a }}{{ a }}{% endset %}{{ {'k': t, (1, 2): 1}['k'] }}{{ 'a'.center(9) ~ 2 ** 9 ~ (7 % 4) }}",
        "{% macro m(x) %}<{{ x }}{{ caller() }}>{% endmacro %}{% call m(a) %}{{ b | length | string }}{% endcall %}",
    ],
)  # fmt: skip
def test_limits_change_nothing_that_stays_within_them(template: str) -> None:
    """A template renders as in Jinja's own sandbox."""
    row = {"a": "secret-value", "b": [1, 2, 3], "none_": None}
    theirs = ImmutableSandboxedEnvironment().from_string(template).render(row)
    assert LimitedSandbox().from_string(template).render(row) == theirs


@pytest.mark.parametrize(
    ("begin", "end", "times"),
    [("{% for i in a %}", "{% endfor %}", 25), ("{% if a %}", "{% endif %}", 110), ("{{" + "(" * 500, "1}}", 1)],
)
def test_a_template_that_python_cannot_compile_is_a_configuration_error(begin: str, end: str, times: int) -> None:
    """Blocks and expressions nested deeper than Python compiles say so before anything starts."""
    with pytest.raises(ConfigError, match="does not compile"):
        compile_template(begin * times + end * times)


def test_template_errors_never_quote_values() -> None:
    """A name looked up by a row's value stays out of the message."""
    table = pa.table({"a": ["secret-value"], "d": [{"k": 1}]})
    for template in ("{{ d[a] }}", "{{ '%d' % a }}", "{{ d | attr(a) }}"):
        row = rendered(table, spec(PromptSpec(template=template)))[0]
        assert row["reason"] == "invalid"
        assert "secret-value" not in row["message"]


def test_template_syntax_is_checked_before_anything_starts() -> None:
    """A template that does not parse is a configuration error with its line."""
    with pytest.raises(ConfigError, match="line 2"):
        compile_template("ok\n{% for %}")


def test_missing_columns_name_the_nearest() -> None:
    """Every column that a job names is checked against the input, and a misspelt one is told its neighbour."""
    schema = pa.schema(
        [("title", pa.string()), ("prompt", pa.string()), ("customer", pa.string()), ("row_id", pa.int64())]
    )
    for prompt in (
        PromptSpec(column="promt"), PromptSpec(id="rowid"), PromptSpec(tenant="custmer"),
        PromptSpec(template="{{ titel }}"),
    ):  # fmt: skip
        with pytest.raises(InputError, match="did you mean"):
            check_columns(spec(prompt), schema)
    check_columns(
        spec(PromptSpec(template="{{ title }} {{ range(3) | list }}", id="row_id", tenant="customer")), schema
    )


def test_contradictory_prompts_are_refused() -> None:
    """Raw prompts have no system message and no messages; a prompt column is text or messages; a model is named."""
    text, numbers = pa.schema([("prompt", pa.string())]), pa.schema([("prompt", pa.int64())])
    messages = pa.schema([("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))])
    with pytest.raises(ConfigError):
        check_columns(spec(PromptSpec(format="raw", system="s")), text)
    with pytest.raises(InputError):
        check_columns(spec(PromptSpec(format="raw")), messages)
    with pytest.raises(InputError):
        check_columns(spec(), numbers)
    with pytest.raises(ConfigError):
        check_columns(spec(model=None), text)
    with pytest.raises(ConfigError):
        check_columns(spec(sampling={"temperature": -1}), text)


def test_a_rows_own_columns_win() -> None:
    """Columns named like sampling keys, model and placement override the job's, row by row."""
    table = pa.table(
        {
            "prompt": ["a"] * 5,
            "max_tokens": [None, 3, 0, 4, 4],
            "model": [None, "big", "small", "smal", "small"],
            "placement": [None, '{"jurisdictions": ["DE"]}', None, None, "{"],
        }
    )
    rows = rendered(table, models={"small": None, "big": None})
    assert [(r["model"], r["max_tokens"]) for r in rows[:2]] == [("small", 8), ("big", 3)]
    assert json.loads(rows[1]["placement"]) == {"jurisdictions": ["DE"]}
    assert [r["reason"] for r in rows] == [None, None, "invalid", "invalid", "invalid"]
    assert "'max_tokens'" in rows[2]["message"]
    assert "did you mean 'small'?" in rows[3]["message"]
    assert "'placement'" in rows[4]["message"]


def test_openai_batch_lines_bring_everything_themselves() -> None:
    """custom_id, messages or prompt, model and sampling come from the line; a bad line is a dead letter."""
    bodies = [
        (
            '{"model": "big", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],'
            ' "max_completion_tokens": 5, "temperature": 0.70}'
        ),
        '{"prompt": "raw text"}',
        "{nonsense",
        '{"messages": [{"role": "user", "content": "a\\ud800b"}]}',
        '{"model": "small", "prompt": ["two"]}',
    ]
    table = pa.table(
        {
            "custom_id": list("abcde"),
            "method": ["POST"] * 5,
            "url": ["/v1"] * 5,
            "body": pa.array(bodies, pa.large_string()),
        }
    )
    job = spec()
    check_columns(job, table.schema)
    rows = rendered(table, job, {"small": None, "big": None})
    assert [r["request_id"] for r in rows] == list("abcde")
    assert (rows[0]["model"], rows[0]["max_tokens"], rows[0]["sampling"]) == (
        "big",
        5,
        '{"max_tokens":5,"temperature":0.70}',
    )
    assert (rows[1]["model"], rows[1]["key"]) == ("small", b"raw text")
    assert [r["reason"] for r in rows] == [None, None, "invalid", "invalid", "invalid"]
    good = table.slice(0, 2)
    assert json.loads(messages_json(good, job)[0].as_py()) == [{"role": "user", "content": "hi"}]
    assert messages_json(good, job)[1].as_py() is None
    assert prompt_text(good, job).to_pylist() == [None, "raw text"]


@pytest.mark.parametrize("first", ["body", "prompt"])
def test_batch_lines_among_plain_ones_are_told_what_to_do(tmp_path: Path, first: str) -> None:
    """Whichever comes first decides what the file is; the others are dead letters that say what to do with them."""
    body = {"messages": [{"role": "user", "content": "hi"}]}
    lines = [{"custom_id": "a", "method": "POST", "url": "/v1", "body": body}, {"id": "b", "prompt": "plain"}]
    lines = lines if first == "body" else lines[::-1]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    plan = plan_input([str(tmp_path / "in.jsonl")])
    rows = rendered(
        read_split(plan.splits[0], plan.schema).select(plan.schema.names), spec(PromptSpec(column="prompt"))
    )
    assert [row["reason"] for row in rows] == [None, "invalid"]
    assert "put the ones and the others into files, and jobs, of their own" in rows[1]["message"]


def test_tools_need_a_model_that_the_endpoint_tokenizes(tools: ModelTools) -> None:
    """A batch line with tools goes to a remote model as it is, and is refused where its prompt is tokenized here."""
    body = '{"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function"}]}'
    table = pa.table({"custom_id": ["a"], "method": ["POST"], "url": ["/v1"], "body": [body]})
    assert json.loads(rendered(table)[0]["sampling"])["tools"] == [{"type": "function"}]
    assert "tools" in rendered(table, models={"small": tools})[0]["message"]


def test_texts_and_messages_may_share_a_jsonl_column() -> None:
    """A column that holds each value as its JSON text gives texts and chats, by what each row has."""
    values = ['"plain"', '[{"role": "user", "content": "hi"}]', "17", None, '""']
    field = pa.field("prompt", pa.large_string(), metadata=JSON_MARK)
    table = pa.Table.from_arrays([pa.array(values, pa.large_string())], schema=pa.schema([field]))
    rows = rendered(table)
    assert [r["reason"] for r in rows] == [None, None, "invalid", "invalid", "invalid"]
    assert rows[0]["key"] == b"plain"
    sent = [json.loads(text) for text in messages_json(table.slice(0, 2), spec()).to_pylist()]
    assert sent == [[{"role": "user", "content": "plain"}], [{"role": "user", "content": "hi"}]]


def test_lines_that_a_reader_could_not_parse_are_invalid() -> None:
    """What the reader says about a line is the dead letter's message."""
    rows = rendered(pa.table({"prompt": ["a", None], "_bidbeam_bad": [None, "line 2 is not JSON"]}))
    assert [r["message"] for r in rows] == [None, "line 2 is not JSON"]


def test_too_long_says_both_numbers(tools: ModelTools) -> None:
    """A prompt that with its answer fits no pool is too long, and the message has the counts."""
    table = pa.table({"prompt": ["the fox", "the lazy dog " * 30]})
    rows = rendered(table, spec(longest_context={"small": 64}), {"small": tools})
    assert [r["reason"] for r in rows] == [None, "too_long"]
    assert rows[1]["input_tokens"] is not None
    assert str(rows[1]["input_tokens"]) in rows[1]["message"]
    assert "64" in rows[1]["message"]


def test_a_models_keys_are_its_tokens(tools: ModelTools) -> None:
    """With a tokenizer the key is the token ids of the whole chat, exact, and engines get them back as lists."""
    table = pa.table({"prompt": ["the quick fox", "dög", "the lazy dog"]})
    for job in (spec(), spec(PromptSpec(system="be brief"))):
        batch = render(table, job, {"small": tools}, file="f", row_start=0, seed=1)
        lists = token_lists(batch.column("key"), 2)
        assert lists.type == pa.list_(pa.int32())
        for text, ids in zip(table["prompt"].to_pylist(), lists.to_pylist(), strict=True):
            head = "<|im_start|>system\nbe brief<|im_end|>\n" if job.prompt.system else ""
            assert tools.decode(ids) == f"{head}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        assert batch.column("input_tokens").to_pylist() == [len(ids) for ids in lists.to_pylist()]
        assert pc.all(batch.column("tokens_exact")).as_py()
        assert token_lists(batch.column("key").slice(1, 1), 2).to_pylist() == lists.to_pylist()[1:2]


def test_models_with_and_without_tokenizers_share_a_table(tools: ModelTools) -> None:
    """Rows of different models come back in their order, each with its own kind of key; bad rows lie between."""
    table = pa.table({"prompt": ["the", "fox", None, "dog"], "model": ["small", "text", "small", "small"]})
    rows = rendered(table, models={"small": tools, "text": None})
    assert [r["key_width"] for r in rows] == [2, 1, None, 2]
    alone = rendered(table.slice(3), models={"small": tools, "text": None})
    assert rows[3]["key"] == alone[0]["key"]
    assert rows[1]["key"] == b"fox"


def test_a_model_without_a_chat_template_cannot_chat(tools: ModelTools, tmp_path: Path) -> None:
    """Chats for a model that has no template are an error of the set-up; raw prompts work."""
    (tmp_path / "tokenizer.json").write_bytes(Path(tools.directory, "tokenizer.json").read_bytes())
    bare = ModelTools(str(tmp_path))
    table = pa.table({"prompt": ["the fox"]})
    with pytest.raises(ModelError, match=r"prompt\.format"):
        rendered(table, models={"small": bare})
    assert rendered(table, spec(PromptSpec(format="raw")), {"small": bare})[0]["reason"] is None


def test_content_tells_requests_apart_by_what_is_asked() -> None:
    """Equal requests have equal content; another prompt, system, sampling, tenant, model, format or seed another."""
    table = pa.table({"prompt": ["a"], "customer": ["c"], "other": ["d"]})
    models = {"small": None, "big": None}
    base = spec(PromptSpec(system="s", tenant="customer"))

    def content(job: RenderSpec, rows: pa.Table = table, seed: int = 1) -> bytes:
        value: bytes = rendered(rows, job, models, seed)[0]["content"]
        return value

    others = [
        content(base, table.set_column(0, "prompt", [["b"]])),
        content(spec(PromptSpec(system="t", tenant="customer"))),
        content(spec(PromptSpec(system="s", tenant="other"))),
        content(spec(PromptSpec(system="s"))),
        content(spec(PromptSpec(tenant="customer"))),
        content(spec(PromptSpec(format="raw", tenant="customer"))),
        content(spec(PromptSpec(system="s", tenant="customer"), sampling={"max_tokens": 9, "temperature": 0})),
        content(spec(PromptSpec(system="s", tenant="customer"), model="big")),
        content(base, seed=2),
    ]
    assert content(base) == content(base)
    assert len({content(base), *others}) == len(others) + 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.none() | st.text(max_size=20),
            st.none() | st.integers(-2, 40),
            st.none() | st.sampled_from(["small", "text", "gone"]),
            st.none() | st.sampled_from(["c1", "c2"]),
        ),
        max_size=12,
    ),
    st.integers(0, 5),
)
def test_a_row_renders_alike_in_any_company(tools: ModelTools, values: list[tuple[Any, ...]], cut: int) -> None:
    """No row is lost, none raises, and none looks different for the rows beside it."""
    schema = pa.schema(
        [("prompt", pa.string()), ("max_tokens", pa.int64()), ("model", pa.string()), ("customer", pa.string())]
    )
    table = pa.Table.from_pylist([dict(zip(schema.names, v, strict=True)) for v in values], schema)
    job = spec(PromptSpec(tenant="customer"), longest_context={"small": 40})
    models = {"small": tools, "text": None}
    whole = render(table, job, models, file="f", row_start=0, seed=3).to_pylist()
    parts = [
        row
        for start, part in ((0, table.slice(0, cut)), (cut, table.slice(cut)))
        for row in render(part, job, models, file="f", row_start=start, seed=3).to_pylist()
    ]
    assert whole == parts[: len(whole)]
    assert len(whole) == len(values) == len(parts)
