"""What `peft-fast demo` shows: the table, the picture, a line of text from each adapter, and what to try next."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .data import END

if TYPE_CHECKING:
    from peft_fast import PeftModel

Losses = dict[str, dict[str, float]]  # {row: {domain: nats per byte}}
Kinds = dict[str, dict[str, Any]]  # {adapter: {"method": ..., "virtual_tokens" or "rank": ..., "numbers": ...}}
PROMPT = "Return the "


def losers(losses: Losses, base_row: str) -> list[str]:
    """One sentence for each adapter that the base or another adapter beats, or equals, on the adapter's own text."""
    sentences = []
    for name in losses:
        if name == base_row:
            continue
        best = min((row for row in losses if row != name), key=lambda row: losses[row][name])
        own, other = losses[name][name], losses[best][name]
        if not own < other:  # also when a loss is NaN
            sentences.append(f"adapter {name} does not win on its own text: loss {own:.3f}, {best} has {other:.3f}")
    return sentences


def table(losses: Losses, base_row: str) -> str:
    """For each adapter: its loss on its own text, the base's, what it gains, and the whole matrix."""
    names = [name for name in losses if name != base_row]
    width = max(len(name) for name in [*names, "adapter"])
    lines = ["Held-out loss, nats per byte (lower is better)", ""]
    lines.append(
        f"{'adapter':<{width}}  {'own text':>9} {'base':>7} {'gain':>7}   |" + "".join(f"{n:>9}" for n in names)
    )
    for name in [base_row, *names]:
        cells = "".join(f"{losses[name][n]:>8.3f}" + ("*" if n == name else " ") for n in names)
        if name == base_row:
            lines.append(f"{name:<{width}}  {'':>9} {'':>7} {'':>7}   |{cells}")
            continue
        own, base = losses[name][name], losses[base_row][name]
        lines.append(f"{name:<{width}}  {own:>9.3f} {base:>7.3f} {base - own:>+7.3f}   |{cells}")
    lines.append("\nRight of the bar: each row's loss on each adapter's text; * marks an adapter's own.")
    return "\n".join(lines)


def kinds(model: "PeftModel") -> Kinds:
    """Of each adapter of the model: method, size, how many numbers its file has."""
    from peft_fast import PeftType, get_peft_model_state_dict

    found: Kinds = {}
    configs: dict[str, Any] = model.peft_config
    for name, config in configs.items():
        is_prefix = config.peft_type == PeftType.PREFIX_TUNING
        size = {"virtual_tokens": config.num_virtual_tokens} if is_prefix else {"rank": config.r}
        tensors = get_peft_model_state_dict(model, adapter_name=name).values()
        method = str(getattr(config.peft_type, "value", config.peft_type))
        found[name] = {"method": method, **size, "numbers": sum(tensor.numel() for tensor in tensors)}
    return found


def said_of(kinds: Kinds) -> str:
    """One line for each kind of adapter."""
    lines: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        if "rank" in kind:
            what = f"LoRA of rank {kind['rank']}, {kind['numbers']:,} numbers"
        else:
            what = f"prefix of {kind['virtual_tokens']} virtual tokens, {kind['numbers']:,} numbers"
        lines.setdefault(what, []).append(name)
    return "\n".join(f"{what}: {', '.join(names)}" for what, names in lines.items())


def draw(losses: Losses, base_row: str, file: Path) -> str:
    """Write the matrix as a heat map and return the sentence that says so, or why not."""
    try:
        import matplotlib
    except ImportError:
        return 'No picture: matplotlib is not installed (pip install "peft_fast[plots]").'
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in losses if name != base_row]
    rows = [base_row, *names]
    change = [[losses[row][name] - losses[base_row][name] for name in names] for row in rows]
    limit = max(abs(value) for line in change for value in line) or 1.0
    figure, axes = pyplot.subplots(figsize=(7.2, 5.0), layout="constrained")
    image = axes.imshow(change, cmap="RdBu_r", vmin=-limit, vmax=limit)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(rows)), ["no adapter (base)", *names])
    axes.set_xlabel("held-out text")
    axes.set_ylabel("adapter")
    axes.set_title("Held-out loss, nats per byte (bold: the adapter's own text)", fontsize=11)
    for i, row in enumerate(rows):
        for j, name in enumerate(names):
            strong = abs(change[i][j]) > 0.6 * limit
            weight = "bold" if row == name else "normal"
            axes.text(
                j,
                i,
                f"{losses[row][name]:.3f}",
                ha="center",
                va="center",
                color="white" if strong else "black",
                weight=weight,
            )
    figure.colorbar(image, label="difference from the base (blue: better)")
    part = file.with_name(f".{file.name}.{os.getpid()}")
    figure.savefig(part, dpi=130, format="png")
    pyplot.close(figure)
    part.replace(file)
    return f"Picture of the table: {file}"


@torch.no_grad()
def samples(model: "PeftModel", names: list[str], seed: int, length: int = 70) -> str:
    """The same prompt, continued by the base and by each adapter."""
    device = next(model.parameters()).device
    prompt = torch.tensor([[END, *PROMPT.encode()]], device=device)

    def text() -> str:
        torch.manual_seed(seed)
        ids = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=length,
            do_sample=True, temperature=0.6, pad_token_id=END, eos_token_id=END,
        )  # fmt: skip
        return bytes(i for i in ids[0].tolist() if i != END).decode(errors="replace").replace("\n", " ")

    with model.disable_adapter():
        lines = [("no adapter", text())]
    for name in names:
        model.set_adapter(name, inference_mode=True)
        lines.append((name, text()))
    return f'"{PROMPT.strip()} ..." as each would go on:\n' + "\n".join(f"  {name:<10}  {line}" for name, line in lines)


def next_steps(out: Path, names: list[str]) -> str:
    """Commands and a few lines of Python that work on what the run has left."""
    adapter = out / "adapters" / names[-1]
    return f"""What to try next:
  peft-fast check {adapter} --base {out / "base"}
  peft-fast generate --model {out / "base"} --adapters-dir {out / "adapters"} --in {out / "requests.jsonl"} \\
      --out {out / "answers.jsonl"}    # every request with its own adapter, in one batch
  peft-fast demo --steps 120 --out {out}        # longer training, larger gains
  peft-fast info                                # which implementation runs on this machine, and why
  python examples/minilm_classification.py      # in a checkout: LoRA on a real sentence encoder
  in Python, or with `from peft import ...`, which reads the same files:
    from peft_fast import AutoPeftModelForCausalLM
    model = AutoPeftModelForCausalLM.from_pretrained("{adapter}")"""


def write_json(file: Path, value: Any) -> None:
    """Write atomically: readers see the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.replace(file)
