"""`peft-fast generate` with prefixes: beside LoRA or alone, each line as the installed peft answers it by itself."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from generate_jobs import NAMES, PREFIXES, Job, Json, save_bart, save_llama, save_prefixes, save_t5, spy_on_batches
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2Config, GPT2LMHeadModel

import peft_fast
from peft_fast.generation import batches as generate_batches, run as generate

EVERY = (None, *NAMES, *PREFIXES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_prefixes(AutoModelForCausalLM, save_llama(tmp_path_factory.mktemp("prompts")))


@pytest.fixture
def job(saved: Path, tmp_path: Path) -> Job:
    return Job(saved, tmp_path)


def requests_for(names: tuple[str | None, ...], count: int, vocab_size: int = 256) -> list[Json]:
    """Requests of all lengths for these adapters, in turn."""
    numbers = torch.Generator().manual_seed(4)
    rows = [torch.randint(3, vocab_size, (1 + (5 * i) % 17,), generator=numbers).tolist() for i in range(count)]
    return [{"input_ids": row, "adapter": names[i % len(names)], "max_new_tokens": 6} for i, row in enumerate(rows)]


def by_peft(saved: Path, auto: Any, requests: list[Json], **arguments: Any) -> list[list[int]]:
    """What the installed peft gives for each request with its adapter alone on the base model."""
    models: dict[str | None, Any] = {}
    found = []
    for request in requests:
        name = request["adapter"]
        if name not in models:
            base = auto.from_pretrained(saved / "base")
            models[name] = peft.PeftModel.from_pretrained(base, saved / "adapters" / name).eval() if name else base
        model, ids = models[name], torch.tensor([request["input_ids"]])
        row = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=request["max_new_tokens"], **arguments
        )[0, 1 if model.config.is_encoder_decoder else ids.shape[1] :].tolist()
        end = model.generation_config.eos_token_id
        found.append(row[: row.index(end) + 1] if end in row else row)
    return found


# ------------------------------------------------------------------------------------------------ answers
def test_prefixes_beside_lora(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, requests = spy_on_batches(monkeypatch), requests_for(EVERY, 25)
    found = job.answers(*requests, more=["--batch-size", "8"])
    assert [r["output_ids"] for r in found] == by_peft(job.saved, AutoModelForCausalLM, requests)
    assert [r["adapter"] for r in found] == [r["adapter"] for r in requests]
    assert len(batches) == 4 and sum({*PREFIXES} < {row.adapter for row in batch} for batch in batches) >= 2
    same = [{**requests[7], "adapter": name} for name in EVERY]
    assert len({tuple(r["output_ids"]) for r in job.answers(*same)}) == 6, "each adapter has a say"


def test_a_prefix_may_be_named_first(job: Job) -> None:
    requests = requests_for(("first", "fr"), 4)
    found = job.answers(*requests, more=["--adapters", f"first={job.saved / 'adapters' / 'long'}"])
    same = [{**request, "adapter": {"first": "long"}.get(request["adapter"], "fr")} for request in requests]
    assert [r["output_ids"] for r in found] == by_peft(job.saved, AutoModelForCausalLM, same)


def test_prefixes_alone(job: Job, tmp_path: Path) -> None:
    job.saved = Path(shutil.copytree(job.saved, tmp_path / "saved"))
    for name in NAMES:
        shutil.rmtree(job.saved / "adapters" / name)
    requests = requests_for((None, *PREFIXES), 9)
    *found, wrong = job.answers(*requests, {**requests[0], "adapter": "fr"})
    assert [r["output_ids"] for r in found] == by_peft(job.saved, AutoModelForCausalLM, requests)
    assert "the adapters are long, short" in wrong["error"]


@pytest.mark.parametrize("save", [save_t5, save_bart])
def test_encoder_decoder(save: Callable[[Path], Path], tmp_path: Path) -> None:
    job = Job(save_prefixes(AutoModelForSeq2SeqLM, save(tmp_path)), tmp_path)
    requests = requests_for(EVERY, 12, vocab_size=100)
    found = job.answers(*requests, more=["--batch-size", "6"])
    assert [r["output_ids"] for r in found] == by_peft(tmp_path, AutoModelForSeq2SeqLM, requests)
    if save is save_bart:  # 40 positions, one of them for the decoder's start
        asked = {**requests[0], "adapter": "long"}
        good, wrong = job.answers({**asked, "max_new_tokens": 31}, {**asked, "max_new_tokens": 32})
        assert good["new_tokens"] and "32 new ones after the 8 of the prefix long are too long" in wrong["error"]


def test_beams_and_sampling(job: Job) -> None:
    requests = requests_for(EVERY, 12)
    found = job.answers(*[{**r, "num_beams": 3} for r in requests])
    assert [r["output_ids"] for r in found] == by_peft(job.saved, AutoModelForCausalLM, requests, num_beams=3)
    sampled = [{**r, "do_sample": True, "temperature": 2.0, "num_return_sequences": 2} for r in requests]
    assert job.answers(*sampled, more=["--batch-size", "8"]) == job.answers(*sampled, more=["--batch-size", "1"])


# ------------------------------------------------------------------------------------------------ positions
def test_a_prefix_takes_positions(job: Job) -> None:
    asked: Json = {"input_ids": [5] * 50, "max_new_tokens": 6}
    lora, full, over, base = job.answers(
        *({**asked, "input_ids": [5] * n, "adapter": name} for name, n in (("fr", 58), ("long", 50), ("long", 51))),
        {**asked, "input_ids": [5] * 59},
    )
    assert "output_ids" in lora and "output_ids" in full
    expected = (
        "a prompt of 51 tokens and 6 new ones after the 8 of the prefix long are too long for the model's 64 positions"
    )
    assert expected in over["error"] and '"max_new_tokens"' in over["error"]
    assert "59 tokens and 6 new ones are too long" in base["error"]


def test_learned_positions_beside_a_row_without_prefix(tmp_path: Path) -> None:
    """In one batch: the longest row has no prefix and fills the table of positions, those with one do not."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=40, initializer_range=0.3)
    config.bos_token_id = config.eos_token_id = 0
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    job = Job(save_prefixes(AutoModelForCausalLM, tmp_path), tmp_path)
    requests = [
        {"input_ids": [5, 6, 7] * length, "adapter": name, "max_new_tokens": 4}
        for name, length in ((None, 12), ("long", 2), ("short", 11))
    ]
    found = job.answers(*requests)
    assert [r.get("output_ids") for r in found] == by_peft(tmp_path, AutoModelForCausalLM, requests)


# ------------------------------------------------------------------------------------------------ what cannot be used
@pytest.mark.parametrize("method", ["PromptTuning", "PromptEncoder", "MultitaskPromptTuning"])
def test_learned_tokens_are_refused(method: str, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = AutoModelForCausalLM.from_pretrained(job.saved / "base")
    more = {"num_tasks": 2} if method.startswith("Multitask") else {}
    more |= {"encoder_hidden_size": 8} if method == "PromptEncoder" else {}
    config = getattr(peft_fast, f"{method}Config")(num_virtual_tokens=4, task_type="CAUSAL_LM", **more)
    peft_fast.get_peft_model(base, config).save_pretrained(tmp_path / "tokens")
    job.write(*requests_for((None,), 1))
    assert job.run("--adapters", f"tokens={tmp_path / 'tokens'}") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"adapter tokens, {tmp_path / 'tokens'}: " in error and "has no mixed batches" in error
    assert "leave this adapter out" in error and job.results() == []


@pytest.mark.parametrize("change", ["layers", "heads", "no layers", "numbers"])
def test_a_prefix_of_another_model(change: str, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job.saved = Path(shutil.copytree(job.saved, tmp_path / "saved"))
    directory = job.saved / "adapters" / "short"
    if change in ("layers", "heads"):
        base = AutoModelForCausalLM.from_pretrained(job.saved / "base")
        given = {"layers": {"num_hidden_layers": 1}, "heads": {"num_key_value_heads": 4}}[change]
        for name, value in given.items():
            setattr(base.config, name, value)
        other = peft_fast.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        model = peft_fast.get_peft_model(type(base)(base.config), other, adapter_name="short")
        model.save_pretrained(job.saved / "adapters")
    else:
        file = directory / "adapter_config.json"
        fields = {"no layers": {"num_layers": None}, "numbers": {"num_virtual_tokens": 4}}[change]
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    job.write(*requests_for((None,), 1))
    code = job.run()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    if change == "no layers":  # filled in from the base
        assert code == 0
        return
    assert code == 1 and f"adapter short, {directory}: " in error and job.results() == []
    words = {"layers": "expected num_layers=2, got 1", "heads": "[3, 128]", "numbers": "[4, 64]"}
    assert words[change] in error and "it says that it is for" in error, error


# ------------------------------------------------------------------------------------------------ going on
def test_stopped_and_gone_on(job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(generate, "WINDOW", 2)
    requests = [{**r, "do_sample": i % 2 == 0} for i, r in enumerate(requests_for(EVERY, 20))]
    expected = job.answers(*requests, more=["--batch-size", "4"])
    content = job.out.read_bytes()
    job.out.unlink()
    run, done = generate_batches.run, []

    def stopped(generator: Any, batch: Any, seed: int) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(batch)
        return run(generator, batch, seed)

    with monkeypatch.context() as patch:
        patch.setattr(generate_batches, "run", stopped)
        assert job.run("--batch-size", "4") == 130
    assert 0 < len(job.results()) < 20
    assert job.run("--batch-size", "4") == 0
    assert job.out.read_bytes() == content and {r["adapter"] for r in expected} == {*EVERY}
    assert "by an earlier run, kept" in capsys.readouterr().out


def test_results_of_another_prefix_are_refused(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job.saved = Path(shutil.copytree(job.saved, tmp_path / "saved"))
    requests = requests_for(EVERY, 6)
    before = job.answers(*requests)
    weights = job.saved / "adapters" / "long" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x3f")
    assert job.run() == 2 and "another --adapters" in capsys.readouterr().err
    assert job.results() == before and job.run("--overwrite") == 0
