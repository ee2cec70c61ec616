"""Small models with adapters, and jobs of `peft-fast generate` on them, for the tests of that command."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import peft_fast
from peft_fast.cli.main import main
from peft_fast.generation import batches as generate_batches

NAMES = ("de", "fr", "it")
PREFIXES = {"long": 8, "short": 3}  # name -> virtual tokens
Json = dict[str, Any]


def save_adapters(base: Any, config: peft_fast.LoraConfig, directory: Path) -> None:
    """Three adapters with random weights, strong enough to change greedy tokens."""
    model = peft_fast.get_peft_model(base, config, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(directory)


def save_prefixes(auto: Any, root: Path) -> Path:
    """adapters/long and adapters/short for the base that is there: prefixes that change greedy tokens."""
    for name, virtual in PREFIXES.items():
        base = auto.from_pretrained(root / "base")
        task = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
        config = peft_fast.PrefixTuningConfig(num_virtual_tokens=virtual, task_type=task)
        model = peft_fast.get_peft_model(base, config, adapter_name=name)
        torch.nn.init.normal_(model.prompt_encoder[name].embedding.weight, std=2.0)
        model.save_pretrained(root / "adapters")
    return root


def save_llama(root: Path) -> Path:
    """base (a Llama whose tokens are bytes) and adapters/de, fr, it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "base")
    lora = peft_fast.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    save_adapters(LlamaForCausalLM.from_pretrained(root / "base"), lora, root / "adapters")
    return root


def save_t5(root: Path) -> Path:
    """base (a T5 without tokenizer) and adapters/de, fr, it."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        initializer_factor=4.0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(root / "base")
    lora = peft_fast.LoraConfig(r=4, target_modules=["q", "v", "wi", "wo"], task_type="SEQ_2_SEQ_LM")
    save_adapters(T5ForConditionalGeneration.from_pretrained(root / "base"), lora, root / "adapters")
    return root


def save_bart(root: Path) -> Path:
    """base (a Bart without tokenizer, 40 positions) and adapters/de, fr, it."""
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=100, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=40, init_std=0.3,
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(root / "base")
    lora = peft_fast.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc1"], task_type="SEQ_2_SEQ_LM")
    save_adapters(BartForConditionalGeneration.from_pretrained(root / "base"), lora, root / "adapters")
    return root


class Job:
    """Requests and results in a directory of their own."""

    def __init__(self, saved: Path, directory: Path) -> None:
        self.saved, self.requests, self.out = saved, directory / "requests.jsonl", directory / "results.jsonl"

    def write(self, *lines: Json | str | bytes) -> None:
        encoded = [json.dumps(line).encode() if isinstance(line, dict) else line for line in lines]
        self.requests.write_bytes(b"".join((e.encode() if isinstance(e, str) else e) + b"\n" for e in encoded))

    def arguments(self, *more: str) -> list[str]:
        return [
            "generate", "--model", str(self.saved / "base"), "--adapters-dir", str(self.saved / "adapters"),
            "--in", str(self.requests), "--out", str(self.out), "--device", "cpu", *more,
        ]  # fmt: skip

    def run(self, *more: str) -> int:
        return main(self.arguments(*more))

    def results(self) -> list[Json]:
        return [json.loads(line) for line in self.out.read_text(encoding="utf-8").splitlines()]

    def answers(self, *lines: Json, more: Sequence[str] = ()) -> list[Json]:
        """The results of these lines, written anew."""
        self.write(*lines)
        self.run("--overwrite", *more)
        return self.results()


def varied(count: int, vocab_size: int = 256, **settings: Any) -> list[Json]:
    """Requests of all lengths, for all adapters and none, in no order."""
    numbers = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 20, (count,), generator=numbers).tolist()
    rows = [torch.randint(3, vocab_size, (length,), generator=numbers).tolist() for length in lengths]
    adapters = [None, "de", "__base__", "fr", "it"]
    return [
        {"input_ids": row, "adapter": adapters[i % 5], "max_new_tokens": 6, **settings} for i, row in enumerate(rows)
    ]


def alone(saved: Path, auto: Any, requests: Sequence[Json], **arguments: Any) -> list[list[int]]:
    """What model.generate gives for each request without any other beside it, the adapter set or switched off."""
    names = iter(NAMES)
    first = next(names)
    base = auto.from_pretrained(saved / "base")
    model = peft_fast.PeftModel.from_pretrained(base, saved / "adapters" / first, adapter_name=first)
    for name in names:
        model.load_adapter(saved / "adapters" / name, adapter_name=name)
    model.eval()
    found = []
    for request in requests:
        ids = torch.tensor([request["input_ids"]])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **arguments}
        given["max_new_tokens"] = request["max_new_tokens"]
        if request["adapter"] in (None, "__base__"):
            with model.disable_adapter():
                rows = model.generate(**given)
        else:
            model.set_adapter(request["adapter"])
            rows = model.generate(**given)
        start = 1 if base.config.is_encoder_decoder else ids.shape[1]
        row = rows[0, start:].tolist()
        end = base.generation_config.eos_token_id
        found.append(row[: row.index(end) + 1] if end in row else row)
    return found


def spy_on_batches(monkeypatch: pytest.MonkeyPatch) -> list[list[generate_batches.Request]]:
    """A list that gets the batches that are run."""
    seen: list[list[generate_batches.Request]] = []
    run = generate_batches.run

    def spy(generator: Any, batch: Any, seed: int) -> Any:
        seen.append(list(batch))
        return run(generator, batch, seed)

    monkeypatch.setattr(generate_batches, "run", spy)
    return seen
