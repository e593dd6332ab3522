"""Span corruption: known lengths, exact counts, nothing lost, nothing seen that should not be."""

import json

import numpy as np
import pytest
import torch
from conftest import MODELS, SPAN_MODELS, history, make_text, recipe_arguments, run_recipe
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSeq2SeqLM

from unlabeled import UserError
from unlabeled.config import SpanArguments
from unlabeled.data.collators import DataCollatorForSpanCorruption
from unlabeled.data.packing import span_row_cost
from unlabeled.data.preparing import load_prepared, prepare
from unlabeled.data.row_writer import ONE_TOKEN
from unlabeled.data.sources import Source
from unlabeled.data.span_corruption import add_span_tokens, corrupt, spans_by_sentinel
from unlabeled.data.tokenization import load_tokenizer
from unlabeled.models.attention import check_isolation, separate_cross_attention_mask
from unlabeled.models.configs import scratch_config
from unlabeled.planning import count_parameters, training_flops_per_token
from unlabeled.planning.spans import Denoiser, span_lengths

LENGTH, T5 = 48, (Denoiser(),)
UL2 = [
    {"noise_density": 0.15, "mean_noise_span_length": 3, "mode": "[NLU]"},
    {"noise_density": 0.15, "mean_noise_span_length": 8, "mode": "[NLU]"},
    {"noise_density": 0.25, "mean_noise_span_length": 1e9, "mode": "[S2S]"},
    {"noise_density": 0.5, "mean_noise_span_length": 3, "mode": "[NLG]"},
]


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return load_tokenizer(tokenizers["span"])


@pytest.fixture(scope="module")
def prepared(corpus, tokenizer, tmp_path_factory):
    def make(denoisers=T5):
        cache = str(tmp_path_factory.mktemp("prepared"))
        sources = [Source(corpus["train"])], [Source(corpus["validation"])]
        return load_prepared(prepare(*sources, tokenizer, "span", LENGTH, cache, denoisers=denoisers))

    return make


def example(documents: list[np.ndarray], row: int = 0, epoch: int = 0) -> dict:
    return {"input_ids": np.concatenate(documents), "lengths": [len(d) for d in documents], "row": row, "epoch": epoch}


def ordinary(tokenizer, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.setdiff1d(range(len(tokenizer)), tokenizer.all_special_ids), length)


@pytest.mark.parametrize(
    ("inputs", "density", "mean", "text", "targets"),
    [
        (512, 0.15, 3, 568, 114), (256, 0.15, 3, 284, 58), (128, 0.15, 3, 141, 29), (1024, 0.15, 3, 1137, 229),
        (114, 0.15, 3, 126, 26), (512, 0.5, 3, 766, 512), (512, 0.15, 8, 588, 100), (512, 0.5, 32, 990, 512),
        (64, 0.2, 2, 70, 22), (64, 0.2, 1, 63, 27),
    ],
)  # fmt: skip
def test_span_lengths_of_t5(inputs, density, mean, text, targets):
    denoiser = Denoiser(density, mean)
    assert denoiser.fitting(inputs) == (text, targets)
    if mean != 32:  # of which T5's helper says one more of both than there is
        assert denoiser.lengths(text) == (inputs, targets)


def test_sentinels_of_t5():
    noise = np.array([1, 1, 0, 0, 1, 0], dtype=bool)
    inputs, targets = corrupt(np.arange(10, 16), noise, list(range(999, 899, -1)))
    assert inputs.tolist() == [999, 12, 13, 998, 15]
    assert targets.tolist() == [10, 11, 999, 14, 998]


def test_text_rebuilt_from_inputs_and_targets(tokenizer):
    """3,000 random lengths, densities, span lengths and vocabularies: exact counts, and nothing lost or invented."""
    draw = np.random.default_rng(0)
    collator = DataCollatorForSpanCorruption(tokenizer, max_length=1024)
    for trial in range(3000):
        denoiser = Denoiser(draw.uniform(0.02, 0.9), draw.uniform(1, 12))
        length = int(draw.integers(2, 400))
        noise, spans = denoiser.counts(length)
        first = int(draw.integers(1, 100_000))  # sentinels at the end of a vocabulary of any size
        collator.denoisers, collator.mode_ids = (denoiser,), [[]]
        collator.sentinels = list(range(first + spans, first, -1))
        text = draw.integers(first + 1, size=length)
        text[text == tokenizer.eos_token_id] = 0
        ((inputs, targets),) = collator.corrupt_documents(example([text], row=trial))
        assert (len(inputs), len(targets)) == denoiser.lengths(length)
        assert inputs[-1] == targets[-1] == tokenizer.eos_token_id
        inputs, targets = inputs[:-1], targets[:-1]
        used = collator.sentinels[:spans]
        assert inputs[inputs > first].tolist() == targets[targets > first].tolist() == used
        assert inputs[0] <= first and inputs[-1] == used[-1], "text begins, noise ends"
        assert targets[0] == used[0] and targets[-1] <= first
        restored = spans_by_sentinel(targets, used)
        assert sum(map(len, restored.values())) == noise and all(restored.values())
        rebuilt = [token for place in inputs.tolist() for token in restored.get(place, [place])]
        assert rebuilt == text.tolist()


def test_span_divisions_are_uniform(tokenizer):
    """Of 10 tokens 5 in 2 spans: 4 ways for the noise times 4 for the rest, each 1/16 within 5 sigma."""
    collator = DataCollatorForSpanCorruption(tokenizer, denoisers=(Denoiser(0.5, 2.5),), max_length=64)
    text, seen = ordinary(tokenizer, 10), {}
    for row in range(4000):
        key = tuple(collator.corrupt_documents(example([text], row=row))[0][0].tolist())
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 16
    assert max(abs(count - 250) for count in seen.values()) < 5 * (4000 / 16 * 15 / 16) ** 0.5


def test_rows_are_full_and_repeatable(prepared, tokenizer):
    rows, manifest = prepared()
    assert (manifest["raw_length"], manifest["target_length"]) == Denoiser().fitting(LENGTH)
    whole = [
        row
        for row in range(len(rows["train"]))
        if len(rows["train"][row]["lengths"]) == 1 and len(rows["train"][row]["input_ids"]) == manifest["raw_length"]
    ]
    assert len(whole) > 20
    examples = [rows["train"][row] | {"row": row, "epoch": 0} for row in whole]
    collator = DataCollatorForSpanCorruption(
        tokenizer, max_length=LENGTH, decoder_start_token_id=tokenizer.pad_token_id
    )
    batch = collator(examples)
    assert (batch["input_ids"] != tokenizer.pad_token_id).all() and (batch["labels"] != -100).all()
    assert torch.equal(batch["decoder_input_ids"][:, 1:], batch["labels"][:, :-1])
    assert (batch["decoder_input_ids"][:, 0] == tokenizer.pad_token_id).all()
    again = [collator([one]) for one in reversed(examples)]
    assert torch.equal(torch.cat([one["labels"] for one in reversed(again)]), batch["labels"])
    later = collator([one | {"epoch": 1} for one in examples])
    assert (later["labels"] != batch["labels"]).any(dim=1).float().mean() > 0.9


def test_span_rows_contain_whole_documents(corpus, prepared, tokenizer):
    rows, manifest = prepared()
    tokens = sum(len(row["input_ids"]) for row in rows["train"])
    assert tokens == manifest["splits"]["train"]["text_tokens"] and not manifest["splits"]["train"]["left_out"]
    lengths = [length for row in rows["train"] for length in row["lengths"]]
    assert max(lengths) <= manifest["raw_length"] and min(lengths) >= 2
    room = span_row_cost(T5, LENGTH)
    for row in rows["train"]:
        pairs = [Denoiser().lengths(int(length)) for length in row["lengths"]]
        assert sum(room[row["lengths"]]) <= LENGTH
        assert sum(inputs for inputs, _ in pairs) <= LENGTH
        assert sum(targets for _, targets in pairs) <= manifest["target_length"]


def build(model_type: str, tokenizer, **options):
    config = scratch_config(model_type, (MODELS | SPAN_MODELS | BART)[model_type], tokenizer, LENGTH)
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32, **options).eval()
    for parameter in model.parameters():  # the usual initialization is too small for a leak to show
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else None
    model.register_forward_pre_hook(separate_cross_attention_mask, with_kwargs=True)
    start = config.decoder_start_token_id
    return model, DataCollatorForSpanCorruption(tokenizer, max_length=LENGTH, decoder_start_token_id=start)


BART = {
    "bart": {
        "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "dropout": 0.0, "max_position_embeddings": 128,
    }
}  # fmt: skip


@pytest.mark.parametrize("model_type", SPAN_MODELS)
def test_packed_loss_equals_unpacked_loss(model_type, tokenizer):
    """The unpacked side is the model called plainly, as its users will."""
    model, collator = build(model_type, tokenizer)
    assert check_isolation(model, collator).startswith("checked")
    documents = [ordinary(tokenizer, length, seed) for seed, length in enumerate((14, 9, 11))]
    batch = collator([example(documents, row=3)])
    labels = batch.pop("labels")
    with torch.no_grad():
        packed = model(**batch).logits[0].log_softmax(-1)
        assert packed.isfinite().all()
        start = 0
        for inputs, targets in collator.corrupt_documents(example(documents, row=3)):
            targets = torch.from_numpy(targets)
            alone = model(input_ids=torch.from_numpy(inputs)[None], labels=targets[None]).logits[0].log_softmax(-1)
            torch.testing.assert_close(packed[start : start + len(targets)], alone, atol=2e-5, rtol=1e-4)
            assert torch.equal(labels[0, start : start + len(targets)], targets)
            start += len(targets)
    assert (labels[0, start:] == -100).all()


def test_models_without_isolation_are_refused(tokenizer):
    model, collator = build("bart", tokenizer)  # counts its positions from the start of the row
    with pytest.raises(UserError, match=r"BartForConditionalGeneration .* leaks between packed documents"):
        check_isolation(model, collator)
    collator.isolate_documents = False
    assert check_isolation(model, collator).startswith("off")
    biased, collator = build("t5", tokenizer, attn_implementation="varlen")
    with pytest.raises(UserError, match="attn_implementation varlen"):
        check_isolation(biased, collator)
    eager, collator = build("t5", tokenizer, attn_implementation="eager")
    with pytest.raises(UserError, match="set attn_implementation to sdpa"):
        check_isolation(eager, collator)


def test_padding_has_no_gradient(tokenizer):
    model, collator = build("t5", tokenizer)
    batch = collator([example([ordinary(tokenizer, 20)])])  # half of the row is empty
    labels = batch.pop("labels")
    gradients = []
    for filler in (0, 7):
        model.zero_grad()
        ids = batch["input_ids"].clone()
        ids[:, 25:] = filler
        logits = model(**batch | {"input_ids": ids}).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.isfinite().all()
        if "shared" not in name:
            torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)


def test_flops_equal_counter_of_torch():
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 160, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
    from transformers import T5Config

    model = AutoModelForSeq2SeqLM.from_config(T5Config(vocab_size=512, decoder_start_token_id=0, **sizes))
    for source, target in ((128, 29), (96, 96)):
        with FlopCounterMode(display=False) as counter:
            ids = torch.ones(2, source, dtype=torch.long)
            model(input_ids=ids, labels=torch.ones(2, target, dtype=torch.long)).loss.backward()
        mine = 2 * source * training_flops_per_token(model.config, count_parameters(model), source, target)
        assert mine == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_denoiser_mixture(prepared, tokenizers):
    tokenizer = load_tokenizer(tokenizers["span"])
    mixture = SpanArguments(denoisers=json.dumps(UL2)).mixture
    assert (
        add_span_tokens(tokenizer, mixture, LENGTH) == "new tokens for the modes of the denoisers: [NLU], [S2S], [NLG]"
    )
    assert add_span_tokens(tokenizer, mixture, LENGTH) is None
    longest, target_length = span_lengths(mixture, LENGTH)
    assert all(one.lengths(longest)[0] <= LENGTH and one.lengths(longest)[1] <= target_length for one in mixture)
    rows, manifest = prepared(mixture)
    collator = DataCollatorForSpanCorruption(tokenizer, denoisers=mixture, max_length=LENGTH)
    modes = dict.fromkeys(tokenizer.convert_tokens_to_ids([one["mode"] for one in UL2]), 0)
    for row in range(len(rows["train"])):
        one = rows["train"][row] | {"row": row, "epoch": 0}
        assert collator([one])["labels"].shape == (1, manifest["target_length"])
        for (inputs, targets), length in zip(collator.corrupt_documents(one), one["lengths"], strict=True):
            modes[int(inputs[0])] += 1
            shapes = {m.mode: m.lengths(int(length)) for m in mixture}
            assert (len(inputs), len(targets)) in [m.lengths(int(length)) for m in mixture], shapes
            if inputs[0] == tokenizer.convert_tokens_to_ids("[S2S]"):  # the end of the text is what is asked for
                assert inputs[-2] == collator.sentinels[0] and (inputs == collator.sentinels[0]).sum() == 1
    total = sum(modes.values())
    assert [round(count / total * 4) for count in modes.values()] == [2, 1, 1]


def test_span_errors(tokenizers, corpus, tmp_path):
    tokenizer = load_tokenizer(tokenizers["span"])
    with pytest.raises(UserError, match=r"takes texts of 2221 tokens, in which 111 spans .* has 100 sentinels; lower"):
        add_span_tokens(tokenizer, (Denoiser(),), 2000)
    assert add_span_tokens(tokenizer, (Denoiser(),), 1800) is None
    with pytest.raises(UserError, match=r"lacks the sentinels .*train_tokenizer.py --algorithm unigram"):
        add_span_tokens(load_tokenizer(tokenizers["clm"]), T5, LENGTH)
    for options, message in (
        ({"noise_density": 1.0}, "noise_density is 1.0; set it above 0 and below 1"),
        ({"mean_noise_span_length": 0.5}, "mean_noise_span_length is 0.5; set it to 1 or more"),
        (
            {"denoisers": "[{density: 0.1}]"},
            r"denoisers: .* is no mapping of noise_density, mean_noise_span_length, mode",
        ),
    ):
        with pytest.raises(UserError, match=message):
            SpanArguments(**options)
    lone = tmp_path / "lone.jsonl"
    lone.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["the", *make_text(40, 5)]))
    sources = [Source(str(lone))], [Source(corpus["validation"])]
    folder = prepare(*sources, tokenizer, "span", LENGTH, str(tmp_path / "p"), denoisers=T5)
    assert load_prepared(folder)[1]["splits"]["train"]["left_out"].get(ONE_TOKEN, 0) <= 1


def test_span_run(corpus, tokenizers, tmp_path):
    run_recipe("pretrain_span", recipe_arguments("span", "t5", corpus, tokenizers, tmp_path / "run"))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["restored_of"] > 100 and 0 <= metrics["restored_spans"] <= 1
    losses = [entry["loss"] for entry in history(tmp_path / "run") if "loss" in entry]
    assert metrics["eval_loss"] < losses[0] - 0.05 and "bits_per_byte" not in metrics
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run")
    assert model.config.use_cache and model.config.decoder_start_token_id == model.config.pad_token_id
    assert "| hidden | restored |" in (tmp_path / "run" / "samples.md").read_text()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "<extra_id_0>" in card and "AutoModelForSeq2SeqLM" in card


def test_bart_without_isolation(corpus, tokenizers, tmp_path):
    options = {"config_overrides": json.dumps(BART["bart"]), "isolate_documents": "false", "learning_rate": 0.003}
    words = recipe_arguments("span", "bart", corpus, tokenizers, tmp_path / "run", **options)
    run_recipe("pretrain_span", words)
    losses = [entry["loss"] for entry in history(tmp_path / "run") if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    config = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run").config
    assert config.decoder_start_token_id == config.eos_token_id == load_tokenizer(tokenizers["span"]).eos_token_id
