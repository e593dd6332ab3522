"""What is learned of conversations, shown as text: chat templates of fifteen kinds times the shapes of data."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, make_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from unlabeled import UserError
from unlabeled.data.chat_templates import set_chat_template
from unlabeled.data.conversation import Conversation
from unlabeled.data.conversation_tokens import tokenize_rendered
from unlabeled.data.conversations import read_conversations
from unlabeled.data.preferences import prepare_pairs
from unlabeled.data.sources import Source
from unlabeled.data.template_rendering import ChatTemplate
from unlabeled.data.tokenizer_training import train_tokenizer
from unlabeled.data.turn_location import locate_turns

FOLDER = Path(__file__).parent / "chat_templates"
SHIPPED = ROOT / "recipes" / "templates"
SPECIAL = """
<s> </s> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <bos> <start_of_turn>
<end_of_turn> <|im_start|> <|im_end|> <|user|> <|assistant|> <|system|> <|end|> [INST] [/INST] [TOOL_CALLS]
[AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] <｜begin▁of▁sentence｜> <｜end▁of▁sentence｜>
""".split()  # noqa: SIM905
NOT_SPECIAL = """
<think> </think> <tool_call> </tool_call> <｜User｜> <｜Assistant｜> <｜tool▁calls▁begin｜> <｜tool▁call▁begin｜>
<｜tool▁sep｜> <｜tool▁call▁end｜> <｜tool▁calls▁end｜> <｜tool▁output▁begin｜> <｜tool▁output▁end｜>
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Kind:
    """What a template makes of a content.

    Attributes:
        end: what ends a turn, with what stands before it.
        trims: the white space around a content is lost.
        call: how a call is written, with its end; None where the template knows none.
        reasoning: whether `reasoning_content` is written.
        drops_thoughts: what stands before `</think>` in a content is lost.
        system: whether there may be a system's message.
    """

    end: str
    bos: str | None = None
    eos: str = "</s>"
    trims: bool = False
    strips: str = ""
    call: str | None = None
    reasoning: bool = False
    drops_thoughts: bool = False
    system: bool = True
    tool: bool = True


CALL = '{"name": "weather", "arguments": {"city": "Rome"}}'
TAGGED = f"<tool_call>\n{CALL}\n</tool_call><|im_end|>"
DEEPSEEK = {"bos": "<｜begin▁of▁sentence｜>", "eos": "<｜end▁of▁sentence｜>"}
KINDS = {
    "chatml": Kind("<|im_end|>"),
    "llama2": Kind(" </s>", bos="<s>", trims=True, tool=False),
    "llama3": Kind("<|eot_id|>", bos="<|begin_of_text|>", trims=True),
    "llama31": Kind(
        "<|eot_id|>",
        bos="<|begin_of_text|>",
        trims=True,
        call='{"name": "weather", "parameters": {"city": "Rome"}}<|eom_id|>',
    ),
    "mistral": Kind("</s>", bos="<s>", call=f"[TOOL_CALLS][{CALL}]</s>"),
    "gemma": Kind("<end_of_turn>", bos="<bos>", trims=True, system=False, tool=False),
    "qwen25": Kind("<|im_end|>", call=TAGGED),
    "qwen3": Kind("<|im_end|>", call=TAGGED, reasoning=True),
    "phi": Kind("<|end|>", tool=False),
    "zephyr": Kind("</s>", tool=False),
    "smollm2": Kind("<|im_end|>"),
    "smollm3": Kind("<|im_end|>", strips="\n"),
    "deepseek_r1": Kind(**DEEPSEEK, end=DEEPSEEK["eos"], drops_thoughts=True, tool=False),
    "deepseek_v3": Kind(
        **DEEPSEEK,
        end=DEEPSEEK["eos"],
        call="<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        '{"city": "Rome"}<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>',
    ),
    "shipped chatml": Kind("<|im_end|>"),
    "shipped smollm2": Kind("<|im_end|>"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer that has the tokens of every template."""
    path = tmp_path_factory.mktemp("chat") / "tokenizer"
    tokenizer = train_tokenizer(make_text(100, 0), "bpe", 384)
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.add_tokens(NOT_SPECIAL)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizers(folder) -> dict:
    """By template, with its own bos and eos."""
    ready = {}
    for name, kind in KINDS.items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.eos_token = kind.eos
        if kind.bos:
            tokenizer.bos_token = kind.bos
        path = SHIPPED / f"{name.split()[1]}.jinja" if " " in name else FOLDER / f"{name}.jinja"
        assert set_chat_template(tokenizer, str(path)) == [], "all its tokens are there"
        ready[name] = tokenizer
    return ready


def write(path: Path, rows: list[dict]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Source(str(path))


def learned_text(tokenizer, example) -> list[str]:
    """What is learned of a tokenized example, each stretch of it as text."""
    edges = np.flatnonzero(np.diff(example.targets.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [tokenizer.decode(example.ids[start:end]) for start, end in edges]


def message(role: str, content: str | None, **more) -> dict:
    return {"role": role, "content": content} | more


USER, HE, MORE, SHE = message("user", "who"), message("assistant", "he"), message("user", "and"), "she is"
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALLS = [{"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
AFTER_CALL = [message("tool", "sunny", tool_call_id="call00001"), message("assistant", "It is sunny.")]


def answer(kind: Kind, content: str) -> str:
    """The content of a turn and its end, as the template writes them."""
    content = content.strip() if kind.trims else content.lstrip(kind.strips)
    return content + kind.end


# {shape: (row, contents of the learned turns)}
PLAIN_SHAPES = {
    "one turn": ({"messages": [USER, HE]}, ["he"]),
    "several turns": ({"messages": [USER, HE, MORE, message("assistant", SHE)]}, ["he", SHE]),
    "white space": (
        {"messages": [USER, message("assistant", "\n  he \n\n"), MORE, message("assistant", " she")]},
        ["\n  he \n\n", " she"],
    ),
    "an answer that is its header": (
        {"messages": [message("user", "assistant"), message("assistant", "assistant")]},
        ["assistant"],
    ),
    "an answer that is the question": ({"messages": [USER, message("assistant", "who")]}, ["who"]),
    "other scripts": ({"messages": [USER, message("assistant", "é日本 🙂")]}, ["é日本 🙂"]),
    "a completion": ({"prompt": [USER, HE, MORE], "completion": [message("assistant", SHE)]}, [SHE]),
    "a completion as text": ({"prompt": [USER], "completion": SHE}, [SHE]),
    "parts": (
        {
            "messages": [
                message("user", [{"type": "text", "text": "who"}]),
                message("assistant", [{"type": "text", "text": "he", "image_url": None}]),
            ]
        },
        ["he"],
    ),
    "a weight of 0": ({"messages": [USER, HE | {"weight": 0}, MORE, message("assistant", SHE, weight=1)]}, [SHE]),
    "null columns": (
        {"messages": [USER | {"tool_calls": None}, HE | {"tool_calls": None}], "tools": None, "prompt": None},
        ["he"],
    ),
    "sharegpt": ({"conversations": [{"from": "human", "value": "who"}, {"from": "gpt", "value": "he"}]}, ["he"]),
    "alpaca": ({"instruction": "who", "input": "", "output": "he"}, ["he"]),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_learned_text(name, tokenizers, tmp_path):
    """And the ids are the library's own."""
    kind, tokenizer = KINDS[name], tokenizers[name]
    source = write(tmp_path / "data.jsonl", [row for row, _ in PLAIN_SHAPES.values()])
    examples = list(read_conversations(source, tokenizer))
    for (shape, (row, contents)), example in zip(PLAIN_SHAPES.items(), examples, strict=True):
        learned = learned_text(tokenizer, example)
        if name == "llama2":  # whose space before an answer is part of its first word
            learned = [text.lstrip() for text in learned]
        assert learned == [answer(kind, content) for content in contents], shape
        if "messages" in row and shape not in ("parts", "a weight of 0"):
            expected = tokenizer.apply_chat_template(row["messages"])["input_ids"]
            assert example.ids.tolist() == expected, shape


@pytest.mark.parametrize("name", KINDS)
def test_plain_text_examples(name, tokenizers, tmp_path):
    """Prompt and completion as texts: the whole completion and the token that ends a turn, no template around it."""
    tokenizer = tokenizers[name]
    rows = [{"prompt": "who is", "completion": "\n she </s><|im_end|>"}, {"prompt": "", "completion": "she"}]
    first, second = read_conversations(write(tmp_path / "data.jsonl", rows), tokenizer)
    bos = tokenizer.bos_token_id
    for row, example in zip(rows, (first, second), strict=True):
        assert learned_text(tokenizer, example) == [row["completion"] + tokenizer.eos_token]
        assert (
            tokenizer.decode(example.ids)
            == tokenizer.decode([bos]) + row["prompt"] + learned_text(tokenizer, example)[0]
        )
        assert (example.ids == tokenizer.eos_token_id).sum() == 1 + (bos == tokenizer.eos_token_id)


def test_several_templates(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    with pytest.raises(UserError, match=r"has several chat templates \(default, tool_use\); set chat_template to the"):
        set_chat_template(tokenizer, None)


def refusal(rows: list[dict], tokenizer, tmp_path) -> str:
    with pytest.raises(UserError) as error:
        list(read_conversations(write(tmp_path / "refused.jsonl", rows), tokenizer))
    sentence = str(error.value)
    assert sentence.startswith(f"row {len(rows) - 1} of {tmp_path / 'refused.jsonl'} ") and "\n" not in sentence
    return sentence


@pytest.mark.parametrize("name", KINDS)
def test_system_messages(name, tokenizers, tmp_path):
    kind, tokenizer = KINDS[name], tokenizers[name]
    row = {"messages": [message("system", "be good"), USER, HE, MORE, message("assistant", SHE)]}
    column = {"system": "be good", "prompt": [USER, HE, MORE], "completion": SHE}
    if not kind.system:
        assert "System role not supported" in refusal([{"messages": [USER, HE]}, row], tokenizer, tmp_path)
        assert "messages of system, user, assistant" in refusal([row], tokenizer, tmp_path)
        return
    first, second = read_conversations(write(tmp_path / "data.jsonl", [row, column]), tokenizer)
    assert [text.lstrip() for text in learned_text(tokenizer, first)] == [answer(kind, "he"), answer(kind, SHE)]
    assert [text.lstrip() for text in learned_text(tokenizer, second)] == [answer(kind, SHE)]
    assert "be good" in tokenizer.decode(first.ids)
    assert first.ids.tolist() == second.ids.tolist() == tokenizer.apply_chat_template(row["messages"])["input_ids"]


@pytest.mark.parametrize("name", KINDS)
def test_function_calls(name, tokenizers, tmp_path):
    """A turn that only calls a function teaches the call; where the template writes none, the row is refused."""
    kind, tokenizer = KINDS[name], tokenizers[name]
    forms = [
        [message("assistant", None, tool_calls=CALLS)],
        [{"role": "assistant", "tool_calls": CALLS}],
        [message("assistant", "", tool_calls=CALLS, reasoning_content=None)],
    ]
    if kind.call is None:
        row = {"messages": [USER, *forms[0], *AFTER_CALL]}
        assert "has a message with tool_calls, which the chat template does not write" in refusal(
            [{"messages": [USER, HE]}, row], tokenizer, tmp_path
        )
        if "tools" not in tokenizer.chat_template:
            tools = {"messages": [USER, HE], "tools": TOOLS}
            assert "has tools, which the chat template does not write" in refusal([tools], tokenizer, tmp_path)
        return
    rows = [{"messages": [USER, *form, *AFTER_CALL], "tools": TOOLS} for form in forms]
    rows.append(rows[0] | {"tools": json.dumps(TOOLS)})
    sharegpt = [{"from": "human", "value": "who"}, {"from": "function_call", "value": CALL}]
    sharegpt += [{"from": "observation", "value": "sunny"}, {"from": "gpt", "value": "It is sunny."}]
    if name != "mistral":
        rows.append({"conversations": sharegpt, "tools": json.dumps(TOOLS)})
    expected = [kind.call, answer(kind, "It is sunny.")]
    for row, example in zip(rows, read_conversations(write(tmp_path / "data.jsonl", rows), tokenizer), strict=True):
        learned = learned_text(tokenizer, example)
        assert learned == expected
        assert "weather" in tokenizer.decode(example.ids).partition("who")[0] or "function" in tokenizer.decode(
            example.ids
        )
        if "messages" in row:
            messages = [turn | ({} if turn.get("content") else {"content": ""}) for turn in row["messages"]]
            assert example.ids.tolist() == tokenizer.apply_chat_template(messages, tools=TOOLS)["input_ids"]


def test_answer_with_function_call(tokenizers, tmp_path):
    tokenizer = tokenizers["qwen3"]
    row = {"messages": [USER, message("assistant", "Let me look.", tool_calls=CALLS), *AFTER_CALL]}
    [example] = read_conversations(write(tmp_path / "data.jsonl", [row]), tokenizer)
    assert learned_text(tokenizer, example) == [f"Let me look.\n{TAGGED}", "It is sunny.<|im_end|>"]


def test_dropped_role(tokenizers, tmp_path):
    for name, kind in KINDS.items():
        row = {"messages": [USER, HE, *AFTER_CALL]}
        if not kind.tool and name not in ("llama2", "gemma"):  # these raise
            sentence = refusal([row], tokenizers[name], tmp_path)
            assert "the chat template does not write the message of the role 'tool'" in sentence, name


@pytest.mark.parametrize("name", KINDS)
def test_reasoning(name, tokenizers, tmp_path):
    """`reasoning_content` is learned from where the model begins to write it; the thoughts of earlier turns are not."""
    kind, tokenizer = KINDS[name], tokenizers[name]
    thought = message("assistant", "4", reasoning_content="two and two")
    rows = [{"messages": [USER, thought]}, {"messages": [USER, thought, MORE, thought | {"content": "5"}]}]
    if not kind.reasoning:
        sentence = refusal(rows[:1], tokenizer, tmp_path)
        assert "has a message with reasoning_content, which the chat template does not write" in sentence
        return
    first, second = read_conversations(write(tmp_path / "data.jsonl", rows), tokenizer)
    assert learned_text(tokenizer, first) == ["<think>\ntwo and two\n</think>\n\n4<|im_end|>"]
    assert learned_text(tokenizer, second) == ["4<|im_end|>", "<think>\ntwo and two\n</think>\n\n5<|im_end|>"]
    for row, example in zip(rows, (first, second), strict=True):
        assert example.ids.tolist() == tokenizer.apply_chat_template(row["messages"])["input_ids"]
    switched_off = {"messages": [USER, HE], "chat_template_kwargs": {"enable_thinking": False}}
    [example] = read_conversations(write(tmp_path / "off.jsonl", [switched_off]), tokenizer)
    assert learned_text(tokenizer, example) == ["he<|im_end|>"]
    assert "<think>\n\n</think>\n\nhe" in tokenizer.decode(example.ids)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "content", ["<think>\ntwo and two\n</think>\n\n4", "<think>two</think>4", "<think>\n\n</think>\n\n4"]
)
def test_reasoning_inside_content(name, content, tokenizers, tmp_path):
    """As part of the content; a template that drops those of the last turn is refused, if there is anything to drop."""
    kind, tokenizer = KINDS[name], tokenizers[name]
    rows = [{"messages": [USER, message("assistant", content)]}]
    expected = content
    if kind.drops_thoughts:
        if "two" in content:
            sentence = refusal(rows, tokenizer, tmp_path)
            assert "does not write the reasoning of the last answer" in sentence
            return
        expected = content.rpartition("</think>")[2].lstrip()
    if name == "qwen3" and content == "<think>two</think>4":  # which it writes anew
        expected = "<think>\ntwo\n</think>\n\n4"
    [example] = read_conversations(write(tmp_path / "data.jsonl", rows), tokenizer)
    [learned] = learned_text(tokenizer, example)
    assert learned.lstrip() == answer(kind, expected)
    assert example.ids.tolist() == tokenizer.apply_chat_template(rows[0]["messages"])["input_ids"]
    if "</think>" in expected:
        thought = tokenizer.convert_tokens_to_ids("</think>")
        assert (example.ids[example.targets] == thought).sum() == 1, "its own token, as in the model's training"


@pytest.mark.parametrize("name", KINDS)
def test_control_tokens_in_messages(name, tokenizers, tmp_path):
    """Whoever writes them: special ones, those without a name, and those that only the template knows."""
    kind, tokenizer = KINDS[name], tokenizers[name]
    names = [token for token in [*SPECIAL, *NOT_SPECIAL] if token not in ("<think>", "</think>")]
    names = [token for token in names if token in SPECIAL or token in tokenizer.chat_template]
    said = "it writes " + " or ".join(token for token in names if "tool_call>" not in token) + "."
    asked = f"what does {' and '.join(names)} do?<|endoftext|>"
    rows = [{"messages": [message("user", asked), message("assistant", said), MORE, HE]}]
    [example] = read_conversations(write(tmp_path / "data.jsonl", rows), tokenizer)
    learned = [text.lstrip() for text in learned_text(tokenizer, example)]
    assert learned == [answer(kind, said), answer(kind, "he")]
    plain = [message("user", "what"), message("assistant", "it"), MORE, HE]
    text = tokenizer.apply_chat_template(plain, tokenize=False)
    written = tokenizer.apply_chat_template(rows[0]["messages"], tokenize=False)
    assert tokenizer.decode(example.ids) == written, "no character is lost"
    control = [token for token in tokenizer.added_tokens_decoder if token in tokenizer(text)["input_ids"]]
    for token in tokenizer.added_tokens_decoder:
        expected = tokenizer.apply_chat_template(plain)["input_ids"].count(token)
        assert (example.ids == token).sum() == expected, tokenizer.decode([token])
    assert control


@pytest.mark.parametrize("name", KINDS)
def test_preference_pairs(name, tokenizers, tmp_path):
    """Answers are learned from their first character on; what stands before is the prompt of both."""
    kind, tokenizer = KINDS[name], tokenizers[name]
    prompt, chosen, rejected = [USER, HE, MORE], message("assistant", SHE), message("assistant", "she was")
    rows = [
        {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]},
        {"chosen": [*prompt, chosen], "rejected": [*prompt, rejected]},
        {"prompt": "and", "chosen": [*prompt, chosen], "rejected": [*prompt, rejected]},
        {"prompt": prompt, "chosen": [*prompt, chosen], "rejected": [*prompt, rejected]},
        {
            "conversations": [
                {"from": "human", "value": "who"},
                {"from": "gpt", "value": "he"},
                {"from": "human", "value": "and"},
            ],
            "chosen": {"from": "gpt", "value": SHE},
            "rejected": {"from": "gpt", "value": "she was"},
        },
        {"prompt": prompt, "chosen": SHE, "rejected": "she was"},
    ]  # fmt: skip
    for number, row in enumerate(rows):
        source = write(tmp_path / f"{number}.jsonl", [row])
        pairs, manifest = prepare_pairs([source], [source], tokenizer, 512)
        [pair] = pairs["train"]
        assert manifest["splits"]["train"]["left_out"] == {}
        for key, said in (("chosen_ids", SHE), ("rejected_ids", "she was")):
            whole = tokenizer.apply_chat_template([*prompt, message("assistant", said)])["input_ids"]
            assert pair["prompt_ids"] + pair[key] == whole
            assert tokenizer.decode(pair[key]).lstrip().startswith(answer(kind, said))


WHITE = st.sampled_from(["", " ", "\n", "  ", "\n\n", " \n", "\t"])
WORDS = st.sampled_from(
    [
        "he",
        "who",
        "the man",
        "assistant",
        "user",
        "question",
        "answer",
        "<",
        "|",
        ">",
        "im_end",
        "<|im_end|>",
        "<|eot_id|>",
        "</s>",
        "[INST]",
        "<end_of_turn>",
        "<｜User｜>",
        "<think>",
        "<tool_response>",
        "</tool_response>",
        "/no_think",
        "é日",
        "🙂",
        "{{ x }}",
        "{% x %}",
        '"',
        "\\n",
        "'",
        "&lt;",
        "\u2028",
        "\ue000",
        chr(0xF0000),
    ]
)
CONTENTS = st.tuples(WHITE, st.lists(WORDS | WHITE, min_size=1, max_size=6).map("".join), WHITE).map("".join)
CONTENTS = CONTENTS.filter(lambda text: text.strip() and "</think>" not in text)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(CONTENTS, min_size=2, max_size=4), system=st.none() | CONTENTS)
def test_learned_text_of_any_content(name, contents, system, tokenizers):
    """Whatever people write: the answers are learned to the letter, or the row is refused in one sentence."""
    kind, tokenizer = KINDS[name], tokenizers[name]
    contents = contents[: len(contents) // 2 * 2]
    messages = [message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    if system and kind.system:
        messages = [message("system", system), *messages]
    template = ChatTemplate(tokenizer)
    rendered = locate_turns(template, Conversation(messages))
    [example] = tokenize_rendered(template, [rendered])
    learned = [rendered.text[start:end] for start, end in rendered.turns]
    expected = [content.strip() if kind.trims else content.lstrip(kind.strips) for content in contents[1::2]]
    if name == "qwen3":  # which strips the last answer only
        expected[-1] = expected[-1].lstrip("\n")
    assert learned == [content + kind.end for content in expected]
    written = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered.text == written == tokenizer.decode(example.ids)
    assert "".join(text.lstrip() for text in learned_text(tokenizer, example)) == "".join(
        text.lstrip() for text in learned
    )
    plain = tokenizer.apply_chat_template([turn | {"content": "x"} for turn in messages])["input_ids"]
    special = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
    assert [index for index in example.ids if index in special] == [index for index in plain if index in special]
