"""Rows that people have: roles, lengths, empty texts, repeated prompts, missing values, odd tokenizers."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, make_text, recipe_arguments, run_recipe
from datasets import Dataset
from test_finetuning import CHATML, PAIR, exchange, make_conversations, make_pairs, read, words_of, write_lines
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from unlabeled import UserError
from unlabeled.data.chat_templates import set_chat_template
from unlabeled.data.conversation import Conversation
from unlabeled.data.conversations import read_conversations
from unlabeled.data.preferences import prepare_pairs
from unlabeled.data.preparing import load_prepared, prepare
from unlabeled.data.sources import Source
from unlabeled.data.summary import describe_dataset, describe_left_out
from unlabeled.data.template_rendering import ChatTemplate
from unlabeled.data.tokenization import encode_batch
from unlabeled.data.tokenizer_training import train_tokenizer
from unlabeled.data.turn_location import locate_turns
from unlabeled.models.generation import reply
from unlabeled.reporting.samples import first_prompts

THINKING = (
    Path(CHATML).read_text(encoding="utf-8").replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif")
)
PLAIN = (ROOT / "tests" / "chat_templates" / "chatml.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    ready = AutoTokenizer.from_pretrained(tokenizers["clm"])
    set_chat_template(ready, CHATML)
    return ready


def learned(tokenizer, rows, tmp_path) -> list[str]:
    """What is learned of each row, as one text."""
    source = Source(write_lines(tmp_path / "data.jsonl", rows))
    return [tokenizer.decode(example.ids[example.targets]) for example in read_conversations(source, tokenizer)]


def refusal(rows, tokenizer, tmp_path, read=read_conversations) -> str:
    source = Source(write_lines(tmp_path / "refused.jsonl", rows))
    with pytest.raises(UserError) as error:
        list(read(source, tokenizer))
    return str(error.value).removeprefix(f"row {len(rows) - 1} of {source.path} ")


def pairs_of(rows, tokenizer, tmp_path, **options):
    source = Source(write_lines(tmp_path / "pairs.jsonl", rows))
    return prepare_pairs([source], [source], tokenizer, options.pop("max_length", 256), **options)


# --- Targets ----------------------------------------------------------------------------------------------------------


def test_generation_prompt_with_extra_text(tokenizers, tmp_path):
    """Templates whose generation prompt ends in `<think>`: the same ids and targets as without that."""
    assert "<think>" in THINKING
    (tmp_path / "think.jinja").write_text(THINKING, encoding="utf-8")
    rows = [
        {"prompt": messages[:-1], "completion": messages[-1:]}
        for messages in (row["messages"] for row in make_conversations(60, 0))
    ]
    source, results = Source(write_lines(tmp_path / "data.jsonl", rows)), []
    for path in (CHATML, tmp_path / "think.jinja"):
        tokenizer = AutoTokenizer.from_pretrained(tokenizers["clm"])
        set_chat_template(tokenizer, str(path))
        prepared, manifest = load_prepared(prepare([source], [source], tokenizer, "sft", 96, str(tmp_path)))
        counts = manifest["splits"]["train"]
        assert counts["documents"] == 60 and counts["left_out"] == {}
        results.append([(row["input_ids"].tolist(), row["targets"].tolist()) for row in prepared["train"]])
        expected = sum(len(tokenizer.encode(row["completion"][0]["content"])) + 1 for row in rows)
        assert counts["targets"] == sum(sum(targets) for _, targets in results[-1]) == expected
    assert results[0] == results[1]


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("template", [CHATML, PLAIN], ids=["markers", "no markers"])
def test_trimmed_offsets(trim, template, tokenizers, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["clm"])
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    path = tmp_path / "chat.jinja"
    path.write_text(PLAIN if template == PLAIN else Path(template).read_text(encoding="utf-8"), encoding="utf-8")
    set_chat_template(tokenizer, str(path))
    messages = [
        message for answer in ("one", "two", " three", "\n  \n four \n", "5 ") for message in exchange("q", answer)
    ]
    assert learned(tokenizer, [{"messages": messages}], tmp_path) == [
        "one<|im_end|>two<|im_end|> three<|im_end|>\n  \n four \n<|im_end|>5 <|im_end|>"
    ]
    offsets = tokenizer("a the", return_offsets_mapping=True)["offset_mapping"]
    assert offsets[1][0] == (2 if trim else 1), "the tokenizer is as it was"


def test_tokens_across_turn_boundary(tokenizers, tmp_path):
    """A header without white space after it, whose colon forms a token with the answer."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["clm"])
    tokenizer.add_tokens([":he"])
    body = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|end|>' }}{% endfor %}"
    (tmp_path / "chat.jinja").write_text(body, encoding="utf-8")
    set_chat_template(tokenizer, str(tmp_path / "chat.jinja"))
    rows = [{"messages": exchange("who", "she")}, {"messages": exchange("who", "he is")}]
    assert learned(tokenizer, rows[:1], tmp_path) == ["she<|end|>"]
    assert refusal(rows, tokenizer, tmp_path) == (
        "cannot be aligned: a token holds the beginning of 'he is<|end|>' and what stands before it; correct it or "
        "leave it out"
    )


def test_turn_without_end(tokenizers, tmp_path):
    """A template that ends the last turn only: what opens the next question is no end."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["clm"])
    tokenizer.add_tokens(["[INST]", "[/INST]"], special_tokens=True)
    body = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]{% else %}{{ m['content'] }}"
    )
    body += "{% if loop.last %}{{ eos_token }}{% endif %}{% endif %}{% endfor %}"
    (tmp_path / "chat.jinja").write_text(body, encoding="utf-8")
    set_chat_template(tokenizer, str(tmp_path / "chat.jinja"))
    rows = [{"messages": exchange("who", "he")}, {"messages": exchange("who", "he") + exchange("and", "she")}]
    assert learned(tokenizer, rows[:1], tmp_path) == ["he<|endoftext|>"]
    assert refusal(rows, tokenizer, tmp_path).startswith(
        "cannot be learned: the chat template writes no token that ends"
    )


def test_long_white_space_time(tokenizers, tmp_path):
    """Of 5,000 characters of which a template strips the newlines."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["clm"])
    set_chat_template(tokenizer, str(ROOT / "tests" / "chat_templates" / "smollm3.jinja"))
    [text] = learned(tokenizer, [{"messages": exchange("who", "\n" * 2000 + " " * 3000 + "he")}], tmp_path)
    assert text == " " * 3000 + "he<|im_end|>"


def test_inconsistent_template(tokenizers, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["clm"])
    body = "{% for m in messages %}{{ m['content'] | upper | truncate(9, True, '') + '<|end|>' }}{% endfor %}"
    (tmp_path / "chat.jinja").write_text(body, encoding="utf-8")
    with pytest.raises(UserError, match="does not write what the assistant says"):
        set_chat_template(tokenizer, str(tmp_path / "chat.jinja"))
    (tmp_path / "chat.jinja").write_text(body.replace(" | upper", ""), encoding="utf-8")
    set_chat_template(tokenizer, str(tmp_path / "chat.jinja"))
    rows = [{"messages": exchange("who", "it is he")}, {"messages": exchange("who", "it is somebody else")}]
    assert refusal(rows, tokenizer, tmp_path).startswith("cannot be aligned with what the chat template writes;")


# --- Control tokens ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unnamed(tokenizers):
    """Special tokens without a name, and one that is only added; their ids leave a hole in the vocabulary."""
    ready = AutoTokenizer.from_pretrained(tokenizers["clm"])
    ready.add_tokens(
        ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>"], special_tokens=True
    )
    ready.add_tokens(["<|fim_prefix|>", "hyperparameter"])
    template = ROOT / "tests" / "chat_templates" / "llama3.jinja"
    set_chat_template(ready, str(template))
    assert "<|start_header_id|>" not in ready.all_special_tokens
    return ready


def control_ids(tokenizer, ids) -> list[str]:
    control = set(ChatTemplate(tokenizer).control_tokens.values())
    return [tokenizer.convert_ids_to_tokens(index) for index in ids if index in control]


def test_unnamed_special_tokens(unnamed, tmp_path):
    text = "what <|eot_id|> and <|start_header_id|>system<|end_header_id|> do"
    [example] = read_conversations(
        Source(write_lines(tmp_path / "data.jsonl", [{"messages": exchange(text, text)}])), unnamed
    )
    turn = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    assert control_ids(unnamed, example.ids.tolist()) == ["<|endoftext|>", *turn, *turn]
    assert unnamed.decode(example.ids[example.targets]) == text + "<|eot_id|>"
    assert text in unnamed.decode(example.ids[~example.targets])
    pairs, _ = pairs_of([{"prompt": text, "chosen": text, "rejected": "no"}], unnamed, tmp_path)
    [pair] = pairs["train"]
    assert control_ids(unnamed, pair["prompt_ids"]) == ["<|endoftext|>", *turn, *turn[:2]]
    assert control_ids(unnamed, pair["chosen_ids"]) == ["<|eot_id|>"]
    assert unnamed.decode(pair["chosen_ids"]) == text + "<|eot_id|>"


@pytest.mark.parametrize("word_starts", [False, True])
def test_control_tokens_in_plain_text(unnamed, word_starts):
    """Special ones without a name, those of infilling, and those that only the chat template knows."""
    text = "a <|eot_id|> b <|start_header_id|> c <|fim_prefix|> d <|endoftext|>"
    encoded = encode_batch(unnamed, [text, "plain"], word_starts)
    ids = encoded[0] if word_starts else encoded
    assert unnamed.decode(ids[0]) == text and unnamed.decode(ids[1]) == "plain"
    assert control_ids(unnamed, ids[0].tolist()) == []
    assert unnamed.convert_tokens_to_ids("<|fim_prefix|>") not in ids[0]
    word = unnamed.convert_tokens_to_ids("hyperparameter")
    assert encode_batch(unnamed, ["hyperparameter"])[0].tolist() == [word], "added, but not to control anything"


def test_renamed_tokenizer_gives_same_ids(unnamed):
    """The copy with other names gives the same ids, offsets in the text that it is given, also of other kinds."""
    template = ChatTemplate(unnamed)
    messages = exchange("who é日 is\n\n he", "the  old man")
    text = unnamed.apply_chat_template(messages, tokenize=False)
    located = locate_turns(template, Conversation(messages))
    assert located.text == text and located.quoted == []
    for name, other in template.renamed.names.items():
        text = text.replace(name, other)
    ids = template.renamed.backend.encode(text, add_special_tokens=False).ids
    assert template.renamed.original_ids(np.array(ids)).tolist() == unnamed.apply_chat_template(messages)["input_ids"]


def test_control_tokens_in_prompt(unnamed):
    class Model:
        """Keeps what it is asked."""

        device, config = "cpu", None

        def generate(self, ids, **options):
            self.ids = ids
            return ids

    model = Model()
    assert reply(model, unnamed, "what is <|eot_id|>?") == ""
    asked = model.ids[0].tolist()
    assert asked.count(unnamed.convert_tokens_to_ids("<|eot_id|>")) == 1
    assert "what is <|eot_id|>?<|eot_id|>" in unnamed.decode(asked)


@pytest.mark.parametrize("algorithm", ["unigram", "wordpiece"])
def test_other_tokenizers(algorithm, tmp_path):
    """Whose decoding does not give back the text, or whose special tokens are pieces like any other."""
    tokenizer = train_tokenizer(make_text(400, 0), algorithm, 256)
    if algorithm == "wordpiece":
        tokenizer.add_special_tokens({"bos_token": "[CLS]", "eos_token": "[SEP]"})
    set_chat_template(tokenizer, CHATML)
    eos = tokenizer.eos_token_id
    rows = [
        {"messages": exchange("who is", "the old man")},
        {"messages": exchange("who<|im_end|>", "the <|im_end|> man")},
    ]
    source = Source(write_lines(tmp_path / "data.jsonl", rows))
    for example in read_conversations(source, tokenizer):
        targets = np.flatnonzero(example.targets)
        assert (example.ids == eos).sum() == 2 and example.ids[targets[-1]] == eos
        assert tokenizer.decode(example.ids[targets]).split()[0] == "the"


# --- Roles, lengths, empty texts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["model", "gpt", "human", "User", "Assistant"])
def test_unknown_role(role, tokenizer, tmp_path):
    fine = {"messages": exchange("who", "he")}
    spoilt = {"messages": [{"role": "user", "content": "who"}, {"role": role, "content": "he"}]}
    expected = (
        f"has the role {role!r}, which the chat template does not know; rename it to system, user, assistant or tool"
    )
    assert refusal([fine, spoilt], tokenizer, tmp_path) == expected
    with pytest.raises(UserError) as error:
        pairs_of([{"prompt": [{"role": role, "content": "x"}], "chosen": "a", "rejected": "b"}], tokenizer, tmp_path)
    assert str(error.value) == f"row 0 of {tmp_path / 'pairs.jsonl'} {expected}"


def test_unknown_sender(tokenizer, tmp_path):
    row = {"conversations": [{"from": "human", "value": "who"}, {"from": "narrator", "value": "he"}]}
    assert refusal([row], tokenizer, tmp_path).startswith(
        "has a message from 'narrator', which is none of human, user,"
    )


UNREADABLE = {
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "has a content of type 'image_url', and only text can be learned; leave it out",
    ),
    "a number": ({"messages": [{"role": "user", "content": 3}]}, "is no conversation: a content is int, not text"),
    "a weight": (
        {"messages": [*exchange("a", "b"), {"role": "user", "content": "c", "weight": 0.5}]},
        "has a message with weight 0.5; weights are 0 (not learned) and 1",
    ),
    "tools": ({"messages": exchange("a", "b"), "tools": "[{"}, "has tools that are not JSON"),
    "a call that is not JSON": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "weather"}]},
        "has a message from 'function_call' that is not JSON; correct it",
    ),
    "a call of the old kind": (
        {"messages": [*exchange("a", "b"), {"role": "assistant", "content": "", "function_call": {"name": "f"}}]},
        "has a message with function_call, which the chat template does not write; set another, or remove it",
    ),
    "an argument of the library": (
        {"messages": exchange("a", "b"), "chat_template_kwargs": {"tokenize": True}},
        "has chat_template_kwargs with tokenize, which is no variable; remove it",
    ),
    "a text for messages": ({"messages": "who"}, "is no conversation; give it `messages`"),
    "nothing": ({"messages": []}, "is no conversation; give it `messages`"),
    "another table": ({"text": "a"}, "is no conversation; give it `messages`"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_rows(kind, tokenizer, tmp_path):
    row, sentence = UNREADABLE[kind]
    assert refusal([{"messages": exchange("who", "he")}, row], tokenizer, tmp_path).startswith(sentence)


def test_left_out_conversations(tokenizer, tmp_path):
    rows = [
        {"messages": exchange("who", "he")},
        {"messages": exchange("who", "he " * 99)},
        {"messages": exchange("who", "he")[:1]},
        {"messages": exchange("who", " \n")},
        {"messages": exchange("who", None)},
        {"prompt": "who", "completion": ""},
    ]
    source = Source(write_lines(tmp_path / "data.jsonl", rows))
    rows, manifest = load_prepared(prepare([source], [source], tokenizer, "sft", 64, str(tmp_path)))
    expected = {"longer than max_length": 1, "no turn of the assistant": 1, "an empty answer": 3}
    for split in ("train", "validation"):
        assert manifest["splits"][split]["left_out"] == expected and manifest["splits"][split]["documents"] == 1
    assert "1 longer than max_length, 1 no turn of the assistant, 3 an empty answer" in describe_dataset(manifest)


def test_left_out_pairs(tokenizer, tmp_path):
    rows = [
        PAIR,
        PAIR | {"rejected": PAIR["chosen"]},
        PAIR | {"chosen": "he " * 99},
        PAIR | {"rejected": " "},
    ]
    pairs, manifest = pairs_of(rows, tokenizer, tmp_path, max_length=64)
    expected = {"chosen and rejected are the same": 1, "longer than max_length": 1, "an empty answer": 1}
    assert manifest["splits"]["train"]["left_out"] == expected and len(pairs["train"]) == 1
    assert "1 chosen and rejected are the same" in describe_left_out(manifest["splits"]["train"])
    with pytest.raises(UserError) as error:
        pairs_of(rows[1:2] * 3, tokenizer, tmp_path)
    assert str(error.value) == (
        "train_data has no pair of answers that can be learned from (3 with chosen and rejected are the same); add "
        "others"
    )


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_empty_prompts(stage, corpus, tokenizers, tmp_path, capsys):
    """To the end of the recipe, with samples; also where all prompts of the evaluation are empty."""
    parent = tmp_path / "parent"
    options = {"train_tokens": 512, "batch_tokens": 256}
    run_recipe("pretrain_clm", recipe_arguments("clm", "llama", corpus, tokenizers, parent, **options))
    answers = [{"completion": row["chosen"]} if stage == "sft" else row for row in make_pairs(24, 0)]
    rows = [row | {"prompt": ""} for row in answers]
    for split in ("train", "validation"):
        write_lines(tmp_path / f"{stage}_{split}.jsonl", rows)
    words = words_of(stage, tmp_path, parent, tmp_path / "run")
    run_recipe(stage, words)
    assert read(tmp_path / "run", "metrics.json")["eval_loss"] > 0
    assert "**Prompt**" in (tmp_path / "run" / "samples.md").read_text(encoding="utf-8")
    for split in read(tmp_path / "run", "lineage.json")["data"]["splits"].values():
        assert split["documents"] == 24


def test_first_prompts(tmp_path):
    shapes = [
        ({"messages": [{"role": "system", "content": "s"}, *exchange("one", "a")]}, "one"),
        ({"prompt": "two", "completion": "a"}, "two"),
        ({"prompt": "", "completion": "a"}, ""),
        ({"prompt": exchange("three", "")[:1], "completion": "a"}, "three"),
        ({"conversations": [{"from": "human", "value": "four"}, {"from": "gpt", "value": "a"}]}, "four"),
        ({"instruction": "five", "input": "x", "output": "a"}, "five\n\nx"),
        ({"prompt": "six", "chosen": exchange("six", "a"), "rejected": exchange("six", "b")}, "six"),
        ({"chosen": exchange("seven", "a"), "rejected": exchange("seven", "b")}, "seven"),
        ({"messages": exchange("again", "a"), "chosen": exchange("x", "a"), "rejected": exchange("y", "b")}, "again"),
        ({"messages": [{"role": "assistant", "content": "eight"}]}, "eight"),
    ]
    for number, (row, expected) in enumerate(shapes):
        source = Source(write_lines(tmp_path / f"{number}.jsonl", [row, row]))
        assert first_prompts([source]) == [expected]


# --- Preferences ------------------------------------------------------------------------------------------------------

ASKED = "what is the king?"
REPEATED = {
    "UltraFeedback": {"prompt": ASKED, "chosen": exchange(ASKED, "a man"), "rejected": exchange(ASKED, "a boat")},
    "messages": {
        "prompt": exchange(ASKED, "")[:1],
        "chosen": exchange(ASKED, "a man"),
        "rejected": exchange(ASKED, "a boat"),
    },
    "texts": {"prompt": ASKED, "chosen": f"{ASKED} a man", "rejected": f"{ASKED} a boat"},
    "no prompt": {"chosen": exchange(ASKED, "a man"), "rejected": exchange(ASKED, "a boat")},
    "null prompt": {"prompt": None, "chosen": exchange(ASKED, "a man"), "rejected": exchange(ASKED, "a boat")},
    "once": {"prompt": ASKED, "chosen": "a man", "rejected": "a boat"},
}


@pytest.mark.parametrize("kind", REPEATED)
def test_prompt_of_pair_is_not_repeated(kind, tokenizer, tmp_path):
    pairs, _ = pairs_of([REPEATED[kind]] * 3, tokenizer, tmp_path)
    for pair in pairs["train"]:
        start = f"<|endoftext|><|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(pair["prompt_ids"]) == start
        answers = [tokenizer.decode(pair[key]).lstrip() for key in ("chosen_ids", "rejected_ids")]
        assert answers == ["a man<|im_end|>\n", "a boat<|im_end|>\n"]


def test_implicit_prompt(tokenizer, tmp_path):
    """As in Anthropic's data on helpful answers."""
    row = {"chosen": "Human: who? Assistant: the king", "rejected": "Human: who? Assistant: the queen"}
    [pair] = pairs_of([row], tokenizer, tmp_path)[0]["train"]
    assert "user\nHuman: who? Assistant: the<|im_end|>" in tokenizer.decode(pair["prompt_ids"])
    assert tokenizer.decode(pair["chosen_ids"]).strip() == "king<|im_end|>"


def test_answers_that_start_like_the_prompt(tokenizer, tmp_path):
    """A prompt is repeated in all rows of a file or in none."""
    rows = [{"prompt": "the", "chosen": "the man", "rejected": "the boat"}, PAIR]
    pairs, _ = pairs_of(rows, tokenizer, tmp_path)
    assert tokenizer.decode(pairs["train"][0]["chosen_ids"]) == "the man<|im_end|>\n"


def test_prompt_missing_in_conversations(tokenizer, tmp_path):
    row = REPEATED["UltraFeedback"] | {"prompt": "who?"}
    with pytest.raises(UserError, match="has a prompt that is not in the conversations of its answers; correct it"):
        pairs_of([row], tokenizer, tmp_path)


def test_reasoning_belongs_to_answer(tokenizers, tmp_path):
    """A template that writes a thought before one answer of a pair and not before the other."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["clm"])
    set_chat_template(tokenizer, str(ROOT / "tests" / "chat_templates" / "qwen3.jinja"))
    thought = {"role": "assistant", "content": "4", "reasoning_content": "two and two"}
    row = {"prompt": "2+2", "chosen": [thought], "rejected": "5"}
    [pair] = pairs_of([row], tokenizer, tmp_path)[0]["train"]
    assert tokenizer.decode(pair["prompt_ids"]).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(pair["chosen_ids"]).startswith("<think>\ntwo and two\n</think>\n\n4<|im_end|>")
    assert tokenizer.decode(pair["rejected_ids"]).startswith("<think>\n\n</think>\n\n5<|im_end|>")


# --- Formats ----------------------------------------------------------------------------------------------------------


def test_same_tokens_in_parquet_and_jsonl(tokenizers, tmp_path):
    """Columns and fields that a row lacks are null in .parquet."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["clm"])
    set_chat_template(tokenizer, str(ROOT / "tests" / "chat_templates" / "qwen25.jinja"))
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    other = {"type": "function", "function": {"name": "time", "arguments": {"zone": "UTC"}}}
    rows = [
        {"messages": exchange("who", "he")},
        {
            "messages": [
                {"role": "user", "content": "who"},
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "content": "sunny"},
                {"role": "assistant", "content": "fine"},
            ]
        },
        {"messages": [{"role": "user", "content": "who"}, {"role": "assistant", "tool_calls": [other]}]},
        {"prompt": "a", "completion": "b"},
        {"prompt": None, "completion": None, "messages": exchange("2021-03-10", "2021-03-11T10:00:00")},
    ]
    table = pa.Table.from_pylist(
        [{"prompt": None, "completion": None, "messages": None, "tools": None} | row for row in rows]
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    assert table.to_pylist()[1]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {
        "city": "Rome",
        "zone": None,
    }
    first = list(read_conversations(Source(write_lines(tmp_path / "rows.jsonl", rows)), tokenizer))
    second = list(read_conversations(Source(str(tmp_path / "rows.parquet")), tokenizer))
    for one, two in zip(first, second, strict=True):
        assert one.ids.tolist() == two.ids.tolist() and one.targets.tolist() == two.targets.tolist()
    assert '"arguments": {"zone": "UTC"}' in tokenizer.decode(second[2].ids)
    assert tokenizer.decode(second[4].ids[second[4].targets]) == "2021-03-11T10:00:00<|im_end|>"


def test_dates_and_surrogates(tokenizer, tmp_path):
    half = r'{"messages": [{"role": "user", "content": "a \ud83d b"}, {"role": "assistant", "content": "c \ud83d"}]}'
    (tmp_path / "half.jsonl").write_text(half + "\n", encoding="utf-8")
    source = Source(str(tmp_path / "half.jsonl"))
    rows, manifest = load_prepared(prepare([source], [source], tokenizer, "sft", 64, str(tmp_path)))
    row = rows["train"][0]
    assert tokenizer.decode(row["input_ids"][row["targets"]]) == "c \ufffd<|im_end|>"
    assert sum(manifest["repaired"].values()) >= 1
    assert learned(tokenizer, [{"prompt": "when", "completion": "1815-06-10"}], tmp_path) == ["1815-06-10<|im_end|>"]
    assert learned(tokenizer, [{"messages": exchange("when", "1815-06-10")}], tmp_path) == ["1815-06-10<|im_end|>"]
    half_pair = r'{"prompt": "a \ud83d", "chosen": "b", "rejected": "c"}'
    (tmp_path / "half_pair.jsonl").write_text(half_pair + "\n", encoding="utf-8")
    source = Source(str(tmp_path / "half_pair.jsonl"))
    pairs, manifest = prepare_pairs([source], [source], tokenizer, 64)
    assert "a \ufffd<|im_end|>" in tokenizer.decode(pairs["train"][0]["prompt_ids"])
    assert sum(manifest["repaired"].values()) >= 1


def test_alpaca_and_sharegpt(tokenizer, tmp_path):
    sharegpt = [{"from": "human", "value": "say\n\nthis"}, {"from": "gpt", "value": "that"}]
    rows = [
        {"messages": [{"role": "system", "content": "be good"}, *exchange("say\n\nthis", "that")]},
        {"system": "be good", "instruction": "say", "input": "this", "output": "that"},
        {"system": "be good", "conversations": sharegpt},
        {"conversations": [{"from": "system", "value": "be good"}, *sharegpt]},
    ]
    source = Source(write_lines(tmp_path / "data.jsonl", rows))
    examples = [example.ids.tolist() for example in read_conversations(source, tokenizer)]
    assert examples[1:] == examples[:1] * 3
    history = [{"instruction": "and", "output": "her", "history": [["who", "he"]]}]
    assert learned(tokenizer, history, tmp_path) == ["her<|im_end|>"]


def test_rows_saved_by_datasets(tokenizer, tmp_path):
    """Saved by `datasets`, with `tool_calls` that only some messages have."""
    rows = [
        {"messages": exchange("who", "he")},
        {"messages": [*exchange("who", "she"), {"role": "user", "content": "x", "name": "y"}]},
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    source = Source(str(tmp_path / "train.parquet"))
    texts = [tokenizer.decode(example.ids[example.targets]) for example in read_conversations(source, tokenizer)]
    assert texts == ["he<|im_end|>", "she<|im_end|>"]


def test_byte_level_with_prefix_space(tokenizers, tmp_path):
    """The space that such a tokenizer adds before the first word changes no target."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["clm"])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    set_chat_template(tokenizer, CHATML)
    messages = exchange("who<|im_start|>", "he") + exchange("and", "she is")
    texts = learned(tokenizer, [{"messages": messages[2:]}, {"messages": messages}], tmp_path)
    assert [text.replace(" ", "") for text in texts] == ["sheis<|im_end|>", "he<|im_end|>sheis<|im_end|>"]


def sentencepiece_like(kind: str):
    """BPE as in Llama 2 (a normalizer puts spaces) or with a pre-tokenizer that does, as in later conversions."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if kind == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special[:4], show_progress=False)
    backend.train_from_iterator(make_text(200, 0), trainer)
    state = json.loads(backend.to_str())
    vocab = state["model"]["vocab"]
    for token in special[4:]:
        vocab[token] = len(vocab)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


@pytest.mark.parametrize("template", ["llama2", "mistral", "zephyr"])
@pytest.mark.parametrize("kind", ["normalizer", "first", "always"])
def test_metaspace_tokenizers(kind, template, tmp_path):
    """Their first piece has a space that nobody wrote; quoting a control token changes no other piece."""
    tokenizer = sentencepiece_like(kind)
    set_chat_template(tokenizer, str(ROOT / "tests" / "chat_templates" / f"{template}.jinja"))
    messages = exchange("who is he", "the old man, é日.") + exchange("and she", "  his\n wife ")
    quoting = exchange("who is he</s>", "the </s> old man, é日.") + messages[2:]
    source = Source(write_lines(tmp_path / "data.jsonl", [{"messages": messages}, {"messages": quoting}]))
    plain, quoted = read_conversations(source, tokenizer)
    assert plain.ids.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
    end = tokenizer.eos_token_id
    ends = [np.flatnonzero(example.ids == end).tolist() for example in (plain, quoted)]
    assert len(ends[0]) == len(ends[1]) == (4 if template == "zephyr" else 2)
    for example, said in ((plain, "the old man, é日."), (quoted, "the </s> old man, é日.")):
        edges = np.flatnonzero(np.diff(example.targets.astype(int), prepend=0, append=0)).reshape(-1, 2)
        texts = [tokenizer.decode(example.ids[start:stop]) for start, stop in edges]
        assert [text.removesuffix("</s>").strip() for text in texts] == [said, "his\n wife"]
        assert all(text.endswith("</s>") for text in texts)
    # What follows the quotation is as it was.
    tail = len(plain.ids) - ends[0][-2 if template != "zephyr" else 1]
    assert quoted.ids[-tail:].tolist() == plain.ids[-tail:].tolist()


def test_function_call_as_chosen_answer(tokenizers, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["clm"])
    set_chat_template(tokenizer, str(ROOT / "tests" / "chat_templates" / "qwen25.jinja"))
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    chosen = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    row = {"prompt": "weather?", "chosen": chosen, "rejected": "a boat", "tools": [{"name": "weather"}]}
    pairs, _ = pairs_of([row], tokenizer, tmp_path)
    [pair] = pairs["train"]
    assert "<tools>" in tokenizer.decode(pair["prompt_ids"])
    expected = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n'
    assert tokenizer.decode(pair["chosen_ids"]) == expected
    assert tokenizer.decode(pair["rejected_ids"]) == "a boat<|im_end|>\n"
    set_chat_template(tokenizer, CHATML)
    with pytest.raises(UserError, match="has a message with tool_calls, which the chat template does not write"):
        pairs_of([row], tokenizer, tmp_path)


def test_date_in_template(tokenizers, tmp_path):
    """A run that is resumed tomorrow has to learn the same tokens; a row may still set the variable itself."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["clm"])
    dated = "{%- if date is not defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}{{ date }}\n"
    tokenizer.chat_template = dated + Path(CHATML).read_text(encoding="utf-8")
    set_chat_template(tokenizer, None)
    rows = [
        {"messages": exchange("the", "king")},
        {"messages": exchange("the", "king"), "chat_template_kwargs": {"date": "1 May"}},
    ]
    data = write_lines(tmp_path / "dated.jsonl", rows)
    texts = [tokenizer.decode(row.ids) for row in read_conversations(Source(str(data)), tokenizer)]
    assert [text.split("<|")[0] for text in texts] == ["26 Jul 2024", "1 May"]
