"""Train the demo's base model: a byte-level Llama of 1.6 M parameters, on Python's docstrings and pydoc's topics.

The result is committed (peft_fast/demo/assets/base, 3 MB in bfloat16): `peft-fast demo` starts with the adapters.
The four domains of the demo are left out, the base has not seen them. About 15 minutes on 2 cores:

    python examples/train_base.py --out peft_fast/demo/assets/base
"""

import argparse
import math
import time

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from peft_fast.demo import data as demo_data

CONFIG = {
    "vocab_size": demo_data.VOCAB_SIZE,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": demo_data.END,
    "eos_token_id": demo_data.END,
    "pad_token_id": demo_data.END,
}


def random_batch(ids: torch.Tensor, batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """(batch, length) windows that start anywhere."""
    starts = torch.randint(len(ids) - length, (batch, 1), generator=generator)
    return ids[starts + torch.arange(length)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="base")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    texts = demo_data.general_text()
    order = torch.randperm(len(texts)).tolist()
    held_out, train = [texts[i] for i in order[:100]], [texts[i] for i in order[100:]]
    ids, test = demo_data.to_ids(train), demo_data.windows(demo_data.to_ids(held_out), args.length)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(ids):,} bytes of text")

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = args.steps // 20

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (args.steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(args.seed)
    start, smooth = time.perf_counter(), math.log(256)
    bar = tqdm(range(args.steps), desc="base", mininterval=10)
    for _ in bar:
        batch = random_batch(ids, args.batch, args.length, generator)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        smooth += 0.02 * (loss.item() - smooth)
        bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)

    model.eval()
    with torch.no_grad():
        loss = sum(model(input_ids=rows, labels=rows).loss.item() * len(rows) for rows in test.split(32)) / len(test)
    print(f"held-out loss {loss:.3f} nats per byte after {time.perf_counter() - start:.0f} s")
    model.to(torch.bfloat16).save_pretrained(args.out)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
