"""`peft-fast generate`: every line is answered as if it were alone, whatever is batched with it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generate_jobs import NAMES, Job, alone, save_bart, save_llama, save_t5, spy_on_batches, varied

from peft_fast.cli.main import main
from peft_fast.generation import batches as generate_batches, model as generate_model, run as generate


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("generate"))


@pytest.fixture
def job(saved: Path, tmp_path: Path) -> Job:
    return Job(saved, tmp_path)


# ------------------------------------------------------------------------------------------------ answers
def test_each_line_is_answered_as_if_it_were_alone(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    batches, requests = spy_on_batches(monkeypatch), varied(23)
    job.write(*requests)
    assert job.run("--batch-size", "8") == 0
    results = job.results()
    expected = alone(job.saved, LlamaForCausalLM, requests)
    assert [r["index"] for r in results] == list(range(23))
    assert [r["output_ids"] for r in results] == expected
    assert (
        len({tuple(alone(job.saved, LlamaForCausalLM, [{**requests[7], "adapter": n}])[0]) for n in (None, *NAMES)})
        == 4
    )
    for request, result, tokens in zip(requests, results, expected, strict=True):
        adapter = None if request["adapter"] == "__base__" else request["adapter"]
        assert result["adapter"] == adapter and result["prompt_tokens"] == len(request["input_ids"])
        assert result["new_tokens"] == len(tokens)
        assert result["finish_reason"] == ("stop" if tokens[-1] == 0 else "length")
    assert [len(batch) for batch in batches].count(8) == 2, "requests for different adapters share batches"
    assert all(len({row.adapter for row in batch}) > 2 for batch in batches)


@pytest.mark.parametrize("save", [save_t5, save_bart])
def test_encoder_decoder(save: Callable[[Path], Path], tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    job, requests = Job(save(tmp_path), tmp_path), varied(11, vocab_size=100)
    job.write(*requests, {"prompt": "text", "max_new_tokens": 6})
    assert job.run("--batch-size", "4") == 1
    results = job.results()
    assert [r["output_ids"] for r in results[:-1]] == alone(tmp_path, AutoModelForSeq2SeqLM, requests)
    assert "this model has none" in results[-1]["error"]


def test_encoder_and_decoder_have_their_own_positions(tmp_path: Path) -> None:
    job = Job(save_bart(tmp_path), tmp_path)
    prompt, limit = {"input_ids": [5] * 40, "max_new_tokens": 3}, {"input_ids": [5], "max_new_tokens": 39}
    *good, long_prompt, long_answer = job.answers(
        prompt, limit, {**prompt, "input_ids": [5] * 41}, {**limit, "max_new_tokens": 40}
    )
    assert all("output_ids" in result for result in good)
    assert all("too long for the model's 40 positions" in result["error"] for result in (long_prompt, long_answer))


def test_beams(job: Job) -> None:
    from transformers import LlamaForCausalLM

    requests = varied(7)
    found = job.answers(*[{**r, "num_beams": 3, "num_return_sequences": 2} for r in requests])
    expected = alone(job.saved, LlamaForCausalLM, requests, num_beams=3)
    assert [r["output_ids"][0] for r in found] == expected
    assert all(len(r["output_ids"]) == len(r["new_tokens"]) == len(r["finish_reason"]) == 2 for r in found)
    assert all(first != second for first, second in (r["output_ids"] for r in found))


def test_bytes_are_the_tokens_of_a_model_without_tokenizer(job: Job) -> None:
    prompt, same = job.answers(
        {"prompt": "größe", "adapter": "fr", "id": {"any": ["thing", 1.5]}, "max_new_tokens": 8},
        {"input_ids": [0, *"größe".encode()], "adapter": "fr", "max_new_tokens": 8},
    )
    assert prompt["prompt_tokens"] == 8 and prompt["id"] == {"any": ["thing", 1.5]} and "id" not in same
    assert prompt["text"] == bytes(same["output_ids"]).decode(errors="replace") and "output_ids" not in prompt


def test_tokenizer(job: Job, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(256)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    shutil.copytree(job.saved, tmp_path / "with_tokenizer")
    job.saved = tmp_path / "with_tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w1").save_pretrained(job.saved / "base")
    (result,) = job.answers({"prompt": "w3 w40 nothing", "adapter": "de", "max_new_tokens": 6})
    request = {"input_ids": [3, 40, 1], "adapter": "de", "max_new_tokens": 6}
    (tokens,) = alone(job.saved, LlamaForCausalLM, [request])
    assert result["text"].split() == [f"w{token}" for token in tokens if token != 1]


def test_base_model_alone(job: Job) -> None:
    from transformers import LlamaForCausalLM

    request = {**varied(1)[0], "adapter": None}
    job.write(request, {**request, "adapter": "de"})
    arguments = job.arguments()
    del arguments[3:5]  # --adapters-dir
    assert main(arguments) == 1
    base, other = job.results()
    assert base["output_ids"] == alone(job.saved, LlamaForCausalLM, [request])[0]
    assert "no adapter was loaded" in other["error"]


def test_where_a_row_ends(job: Job) -> None:
    asked = {"input_ids": [0, *b"Return"], "adapter": "it", "max_new_tokens": 12}
    tokens = job.answers({**asked, "eos_token_id": 1})[0]["output_ids"]
    last = next(i for i in range(4, 12) if tokens[i] not in tokens[:i])
    row, both, filler = job.answers(
        {**asked, "eos_token_id": tokens[last]},
        {**asked, "eos_token_id": [tokens[last], 1]},
        {**asked, "eos_token_id": tokens[last], "adapter": "de"},
    )
    assert row["output_ids"] == both["output_ids"] == tokens[: last + 1]
    assert row["finish_reason"] == "stop" and row["new_tokens"] == last + 1
    assert filler["output_ids"] != row["output_ids"]


def test_stop_texts(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tokens that are letters: the text ends before the first stop text, the tokens with it."""
    decode = generate_model.ByteCodec.decode
    letters: Callable[..., str] = lambda self, ids: "".join(chr(97 + i % 26) for i in ids)  # noqa: E731
    assert decode(generate_model.ByteCodec(0, frozenset({0})), [0, 65, 66]) == "AB"
    monkeypatch.setattr(generate_model.ByteCodec, "decode", letters)
    asked = {"prompt": "Return", "adapter": "it", "max_new_tokens": 12, "eos_token_id": 1}
    whole = job.answers(asked)[0]["text"]
    stop = whole[5:7]
    at = whole.index(stop)
    one, two, none, other = job.answers(
        {**asked, "stop": stop},
        {**asked, "stop": ["?", whole[3:5], stop]},
        {**asked, "stop": "?"},
        {**asked, "stop": stop, "adapter": "de"},
    )
    assert (one["text"], one["new_tokens"], one["finish_reason"]) == (whole[:at], at + 2, "stop")
    assert two["text"] == whole[: whole.index(whole[3:5])] and len(two["text"]) <= 3
    assert (none["text"], none["finish_reason"]) == (whole, "length")
    assert other["text"] != one["text"]
    new = next(i for i in range(2, 12) if whole[i] not in whole[:i])
    both = job.answers({**asked, "stop": [whole[new], whole[new - 1 : new + 1]]})[0]
    assert (both["text"], both["new_tokens"]) == (whole[: new - 1], new + 1), "the one that begins first counts"


# ------------------------------------------------------------------------------------------------ sampling
def test_sampling_does_not_depend_on_the_rows_beside(job: Job) -> None:
    requests = varied(12, do_sample=True, temperature=2.0, num_return_sequences=2)
    requests[4]["seed"], requests[9] = 11, {**requests[4], "seed": 11}
    results = job.answers(*requests, more=["--batch-size", "8"])
    assert results == job.answers(*requests, more=["--batch-size", "1"])
    assert results[4]["output_ids"] == results[9]["output_ids"], "an own seed counts, not the line"
    assert results[4]["output_ids"][0] != results[4]["output_ids"][1]
    other = job.answers(*requests, more=["--seed", "1"])
    same = [i for i in range(12) if other[i] == results[i]]
    assert same == [4, 9], "--seed is for those without a seed"
    assert len({tuple(r["output_ids"][0]) for r in job.answers(*[requests[0]] * 5)}) > 1, "the line counts"


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"temperature": 1.7}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.3, "top_k": 0},
        {"temperature": 2.0, "top_k": 60, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=",".join,
)  # fmt: skip
def test_sampling_has_transformers_probabilities(settings: dict[str, float], saved: Path) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(saved / "base")
    out = model.generate(
        input_ids=torch.tensor([[5, 6, 7]]), do_sample=True, max_new_tokens=1, output_scores=True, output_logits=True,
        return_dict_in_generate=True, **settings,
    )  # fmt: skip
    scores = out.logits[0]
    for warper in generate_batches._warpers(generate_batches.Settings(do_sample=True, **settings)):
        scores = warper(None, scores)
    torch.testing.assert_close(scores, out.scores[0])
    count = 5000
    sampler = generate_batches._Sampler(torch.arange(count)[:, None] / count, start=3)
    chosen = sampler(torch.zeros(count, 3), scores.expand(count, -1)).argmax(-1)
    frequency = torch.bincount(chosen, minlength=256) / count
    expected = out.scores[0].softmax(-1)[0]
    torch.testing.assert_close(frequency, expected, atol=1.5 / count, rtol=0)
    assert not frequency[expected == 0].any() and (frequency > 0).sum() > 1
    assert not torch.equal(out.scores[0], out.logits[0]), "each of these settings changes something"
    with pytest.raises(ValueError, match="NaN"):
        sampler(torch.zeros(count, 3), scores.expand(count, -1) * torch.nan)


def test_settings_for_all(job: Job) -> None:
    request = varied(2)[1]
    del request["max_new_tokens"]
    settings = '{"do_sample": true, "temperature": 0.001}'
    cold, short, greedy = job.answers(
        request, {**request, "max_new_tokens": 2}, {**request, "do_sample": False},
        more=["--settings", settings, "--max-new-tokens", "5"],
    )  # fmt: skip
    assert cold["output_ids"] == greedy["output_ids"] and cold["new_tokens"] == 5 and short["new_tokens"] == 2
    assert generate_batches.Settings().max_new_tokens == 128
    hot = job.answers(request, more=["--settings", '{"do_sample": true, "temperature": 9, "max_new_tokens": 7}'])[0]
    assert hot["new_tokens"] == 7 and hot["output_ids"][:5] != cold["output_ids"]


# ------------------------------------------------------------------------------------------------ batches
def test_batches_are_planned_in_windows(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "WINDOW", 3)
    batches, requests = spy_on_batches(monkeypatch), varied(30)
    for i in (2, 3, 17):
        requests[i]["max_new_tokens"] = 3
    job.write(*requests)
    assert job.run("--batch-size", "4") == 0
    for batch in batches:
        lines = [row.line for row in batch]
        assert max(lines) // 12 == min(lines) // 12, "a window is 3 batches of 4 lines"
        assert len({row.settings for row in batch}) == 1 and len(batch) <= 4
    first = [batch for batch in batches if batch[0].line < 12 and batch[0].settings.max_new_tokens == 6]
    lengths = sorted([sorted(len(row.tokens) for row in batch) for batch in first])
    assert [n for batch in lengths for n in batch] == sorted(n for batch in lengths for n in batch)
    assert sorted(row.line for batch in batches for row in batch) == list(range(30))


def test_results_are_written_as_soon_as_their_turn_comes(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from outside after each batch: a prefix of the results, with all that has none missing before it."""
    seen, done = [], set[int]()
    run = generate_batches.run

    def spy(generator: Any, batch: Any, seed: int) -> Any:
        count = len(job.results())
        seen.append(count)
        assert count == min(set(range(len(requests) + 1)) - done)
        records = run(generator, batch, seed)
        done.update(records)
        return records

    requests = varied(24)
    monkeypatch.setattr(generate_batches, "run", spy)
    job.write(*requests)
    assert job.run("--batch-size", "4") == 0
    assert seen[0] == 0 and seen[-1] > 4


def test_a_batch_that_fails_costs_only_the_line_that_is_bad(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = varied(10)
    good = job.answers(*requests)
    rows: list[int] = []
    padded = generate_batches._padded

    def short_of_memory(batch: Any, generator: Any) -> Any:
        rows.append(len(batch))
        if 6 in [row.line for row in batch]:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return padded(batch, generator)

    monkeypatch.setattr(generate_batches, "_padded", short_of_memory)
    requests[6]["id"] = "six"
    found = job.answers(*requests)
    assert rows == [10] + [1] * 10
    error = "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert found == [*good[:6], {"index": 6, "id": "six", "error": error}, *good[7:]]

    def dead(batch: Any, generator: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(generate_batches, "_padded", dead)
    job.write(*requests)
    assert job.run("--overwrite") == 1 and job.results() == [], "the device is to blame, no line gets an error"
    assert "illegal memory" in capsys.readouterr().err
    monkeypatch.setattr(generate_batches, "_padded", padded)
    assert job.run() == 0 and [r.get("output_ids") for r in job.results()] == [r["output_ids"] for r in good]


@pytest.mark.parametrize("first", ["de", "own"])
def test_an_adapter_that_brings_base_weights_is_answered_alone(
    saved: Path, tmp_path: Path, first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would change the answers of all the others, and of the base."""
    from safetensors.torch import load_file, save_file
    from transformers import LlamaForCausalLM

    import peft_fast

    own = tmp_path / "own"
    base = LlamaForCausalLM.from_pretrained(saved / "base")
    peft_fast.PeftModel.from_pretrained(base, saved / "adapters" / "de").save_pretrained(
        own, save_embedding_layers=True
    )
    tensors = load_file(own / "adapter_model.safetensors")
    changed = {name: value + ("lora" not in name) for name, value in tensors.items()}
    save_file(changed, own / "adapter_model.safetensors")
    request = tmp_path / "in.jsonl"
    request.write_text('{"prompt": "a", "adapter": "own", "max_new_tokens": 2}\n')
    command = ["generate", "--model", str(saved / "base"), "--in", str(request), "--out", str(tmp_path / "out.jsonl")]
    pairs = [f"own={own}", f"de={saved / 'adapters' / 'de'}"]
    assert main([*command, "--adapters", *(pairs if first == "own" else pairs[::-1])]) == 1
    error = capsys.readouterr().err
    assert "adapter own, " in error and ("change their outputs" in error or "change the answers of the other" in error)
    assert main([*command, "--adapters", pairs[0]]) == 0
