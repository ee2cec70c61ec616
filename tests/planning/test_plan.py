"""`peft-fast plan`: numbers worked out by hand, published sizes, real models, and what must always hold."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peft_fast.cli.main import main
from peft_fast.planning import plan as planner
from peft_fast.planning.plan import (
    GPUS,
    SITES,
    TARGETS,
    Machine,
    Model,
    Workload,
    fewest_gpus,
    memory,
    operations,
    plan,
    predicted_seconds,
    step,
)

ROOT = Path(__file__).resolve().parents[2]


def config(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int = 8, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": 128256, **more,
    }  # fmt: skip


SHAPES = {
    "1B": config(2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True),  # Llama-3.2-1B
    "8B": config(4096, 14336, 32, 32),
    "70B": config(8192, 28672, 80, 64),
    "405B": config(16384, 53248, 126, 128),
}
MODELS = {name: Model.from_config(fields) for name, fields in SHAPES.items()}
LLAMA = MODELS["8B"]
# 3 TB/s, 800 Tflop/s; nothing else costs anything
PLAIN = Machine(
    "plain", 3e12, {"bf16": 8e14}, memory_bytes=80e9, link_bytes_per_second=1e12, launch_seconds=0, exchange_seconds=0
)


def sums(model: Model, work: Workload, gpus: int = 1) -> tuple[float, float, int]:
    """(flops, bytes, launches) of a step."""
    every = operations(model, work, gpus)
    return (
        sum(op.times * op.flops for op in every),
        sum(op.times * op.bytes for op in every),
        sum(op.times * op.launches for op in every),
    )


# Counting parameters


@pytest.mark.parametrize(
    ("name", "billions", "digits"), [("1B", 1.24, 2), ("8B", 8.03, 2), ("70B", 70.6, 1), ("405B", 405.9, 1)]
)
def test_published_sizes(name: str, billions: float, digits: int) -> None:
    assert round(MODELS[name].parameters / 1e9, digits) == billions


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Llama", {"head_dim": 24, "attention_bias": True, "mlp_bias": True}),
        ("Mistral", {"sliding_window": None}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 24}),
        ("Qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    ],
    ids=str,
)
def test_parameters_are_those_of_transformers(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    import torch
    import transformers

    made = getattr(transformers, f"{kind}Config")(
        vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, **fields,
    )  # fmt: skip
    with torch.device("meta"):
        real = getattr(transformers, f"{kind}ForCausalLM")(made)
    made.save_pretrained(tmp_path)
    model = Model.read(tmp_path)
    assert model.parameters == sum(p.numel() for p in real.parameters())
    layers = [module for name, module in real.named_modules() if name.rpartition(".")[2] in SITES]
    assert model.linear_parameters == sum(layer.weight.numel() for layer in layers)
    assert memory(model, Workload(1))["weights"] == 2 * model.parameters


@pytest.mark.parametrize("targets", ["all-linear", "attention", "mlp"])
def test_adapter_is_as_large_as_a_real_one(targets: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import peft_fast

    made = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    lora = peft_fast.LoraConfig(r=5, target_modules=list(TARGETS[targets]), task_type="CAUSAL_LM")
    with torch.device("meta"):
        real = peft_fast.get_peft_model(LlamaForCausalLM(made), lora)
    numbers = sum(p.numel() for p in real.parameters() if p.requires_grad)
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        work = Workload(1, adapters=1, rank=5, targets=TARGETS[targets], adapter_dtype=dtype)
        assert work.adapter_bytes(Model.from_config(made.to_dict())) == size * numbers


# Llama-3-8B by hand


def test_weights_of_a_decode_step() -> None:
    # q, o: 4096 x 4096; k, v: 1024 x 4096; gate, up, down: 14336 x 4096; lm_head: 128256 x 4096
    assert LLAMA.linear_parameters == 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096) == 6_979_321_856
    read = 2 * (6_979_321_856 + 128256 * 4096)
    assert read == pytest.approx(15.0e9, rel=1e-3)
    assert sums(LLAMA, Workload(1))[1] == pytest.approx(read, rel=1e-3)  # what else moves is that little
    assert step(LLAMA, Workload(1), PLAIN).total == pytest.approx(5.00e-3, rel=2e-3)
    assert step(LLAMA, Workload(1), PLAIN).bound == "memory"


@pytest.mark.parametrize(("rank", "megabytes"), [(8, 41.9), (16, 83.9), (64, 335.5)])
def test_bytes_of_an_adapter(rank: int, megabytes: float) -> None:
    # the sum of K + N at the seven sites
    assert 8192 + 5120 + 5120 + 8192 + 3 * 18432 == 81920
    assert Workload(1, rank=rank).adapter_bytes(LLAMA) == rank * 81920 * 2 * 32
    assert Workload(1, rank=rank).adapter_bytes(LLAMA) / 1e6 == pytest.approx(megabytes, abs=0.05)


@pytest.mark.parametrize(("n", "percent"), [(1, 0.6), (8, 4.5), (32, 17.9), (64, 35.8)])
def test_different_adapters_cost_their_bytes(n: int, percent: float) -> None:
    work = Workload(n, adapters=128, rank=16, kernels="one_launch")
    result = plan(LLAMA, work, replace(PLAIN, memory_bytes=math.inf))
    cost = result.step.total - result.base.total
    assert cost == pytest.approx(n * 83_886_080 / 3e12, rel=1e-9)
    assert 100 * cost / 5.00e-3 == pytest.approx(percent, abs=0.1)


def test_128_different_adapters() -> None:
    work = Workload(128, adapters=128, rank=16)  # too many rows for one launch
    result = plan(LLAMA, work, PLAIN)
    assert sum(s.K for s in LLAMA.sites()) == 6 * 4096 + 14336 == 38912
    assert sum(s.N for s in LLAMA.sites()) == 3 * 4096 + 2 * 1024 + 2 * 14336 == 43008
    again = 32 * 2 * 128 * (38912 + 2 * 43008)  # x is read once more, y read and written
    cost = result.step.total - result.base.total
    assert cost == pytest.approx((128 * 83_886_080 + again) / 3e12, rel=1e-9)
    assert 128 * 83_886_080 / 15.009e9 == pytest.approx(0.715, abs=1e-3)
    assert cost / 5.00e-3 == pytest.approx(0.715 + again / 15.009e9, abs=2e-3)


def test_quantized_bases() -> None:
    linear, head, rest = 6_979_321_856, 128256 * 4096, 32 * 2 * 4096 + 4096
    per_weight = {"none": 2, "nf4": 0.5 + 4 / 64, "nf4-dq": 0.5 + 1 / 64 + 4 / (64 * 256)}
    for quantize, size in per_weight.items():
        work = Workload(1, quantize=quantize)
        assert memory(LLAMA, work)["weights"] == pytest.approx(linear * size + 2 * (2 * head + rest), rel=1e-12)
    double = Workload(1, quantize="nf4-dq")
    assert linear * per_weight["nf4-dq"] + 2 * head == pytest.approx(4.65e9, abs=5e6)
    assert step(LLAMA, double, PLAIN).total == pytest.approx(1.55e-3, rel=5e-3)
    rows = 32 * (3 * 4096 + 2 * 1024 + 2 * 14336)
    int8 = memory(LLAMA, Workload(1, quantize="int8"))["weights"]
    assert int8 == linear + 4 * rows + 2 * (2 * head + rest)


def test_flops_and_cache() -> None:
    flops, moved, _ = sums(LLAMA, Workload(2, context=999))
    attention = 32 * 2 * 4 * 4096 * 1000  # two products of 2 * 128 for 32 heads with 1000 keys, 2 rows, 32 layers
    assert flops == 2 * 2 * (6_979_321_856 + 128256 * 4096) + attention
    cache = 32 * 2 * 1000 * 2 * 8 * 128 * 2  # layers, rows, tokens, keys and values, heads, bytes
    assert memory(LLAMA, Workload(2, context=999))["KV cache"] == cache
    assert moved - sums(LLAMA, Workload(2, context=0))[1] == cache * 999 / 1000
    flops, _, _ = sums(LLAMA, Workload(1, tokens=100, context=50))  # token i sees 50 + i + 1
    pairs = sum(50 + i + 1 for i in range(100))
    assert flops == 2 * 100 * 6_979_321_856 + 2 * 128256 * 4096 + 32 * 4 * 4096 * pairs


def test_training_is_two_passes_of_the_base_and_three_of_the_adapters() -> None:
    work = Workload(4, tokens=512, adapters=1, rank=16, train=True)
    M = 4 * 512
    attention = 32 * 4 * 4 * 4096 * (512 * 513 / 2) * 3.5
    flops = 2 * 2 * M * (6_979_321_856 + 128256 * 4096) + attention + 3 * 2 * M * 16 * 81920 * 32
    assert sums(LLAMA, work)[0] == flops
    parts = memory(LLAMA, work)
    assert parts["gradients, AdamW"] == 3 * 83_886_080 and "KV cache" not in parts
    assert memory(LLAMA, replace(work, adapters=4))["gradients, AdamW"] == 3 * 83_886_080  # one is trained
    assert step(LLAMA, work, PLAIN).bound == "compute"


def test_activations_are_about_those_that_autograd_keeps() -> None:
    """Of one more layer; transformers' norms keep copies in fp32 that the estimate leaves out."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import peft_fast

    kept = []
    for layers in (1, 2):
        made = LlamaConfig(
            vocab_size=64, hidden_size=128, intermediate_size=448, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=1,
        )  # fmt: skip
        lora = peft_fast.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        base = LlamaForCausalLM(made).bfloat16()
        real = peft_fast.get_peft_model(base, lora, autocast_adapter_dtype=False).train()
        owned = {p.untyped_storage().data_ptr() for p in real.parameters()}
        saved: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor, owned: set[int] = owned, saved: dict[int, Any] = saved) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in owned:
                saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        ids = torch.ones(4, 64, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            real(ids)
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in saved.values()))
    work = Workload(4, tokens=64, adapters=1, rank=8, train=True)
    model = Model.from_config(made.to_dict())
    one, two = (memory(replace(model, layers=layers), work)["activations"] for layers in (1, 2))
    assert 1.0 <= (kept[1] - kept[0]) / (two - one) < 1.2


def test_launches() -> None:
    assert sums(LLAMA, Workload(8))[2] == 32 * (7 + 1 + 4) + 3
    assert sums(LLAMA, Workload(8, adapters=8))[2] == 32 * (7 + 1 + 4) + 3 + 448
    assert sums(LLAMA, Workload(8, adapters=8, kernels="one_launch"))[2] == 32 * (7 + 1 + 4) + 3
    assert sums(LLAMA, Workload(8, adapters=8, targets=("q_proj", "v_proj")))[2] == 32 * (7 + 1 + 4) + 3 + 128
    slow = replace(PLAIN, launch_seconds=1e-3)
    taken = step(LLAMA, Workload(8, adapters=8), slow)
    assert taken.bound == "launches" and taken.seconds["launches"] == pytest.approx(0.835)
    eager = step(LLAMA, Workload(1, graph=False), PLAIN)
    launches = 32 * 40 + 3
    assert eager.launches == launches and eager.bound == "launches"
    assert eager.total == pytest.approx(launches * PLAIN.eager_launch_seconds)  # the host is the slower one
    busy = Workload(64, tokens=512)
    assert step(LLAMA, replace(busy, graph=False), PLAIN).total == pytest.approx(step(LLAMA, busy, PLAIN).total)


def test_eager_launches_are_those_of_transformers() -> None:
    """Operations of one more layer that are no views."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import LlamaConfig, LlamaForCausalLM

    class Counted(TorchDispatchMode):
        kernels = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.kernels += not func.is_view and func is not torch.ops.aten._unsafe_view.default
            return func(*args, **(kwargs or {}))

    counts = []
    for layers in (1, 2):
        made = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
        model, ids = LlamaForCausalLM(made).bfloat16().eval(), torch.ones(2, 1, dtype=torch.long)
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
            with Counted() as counted:
                model(ids, past_key_values=cache, use_cache=True)
        counts.append(counted.kernels)
    assert counts[1] - counts[0] == pytest.approx(7 + 1 + planner.POINTWISE_LAUNCHES[False], abs=4)


def test_implementations_are_the_operators() -> None:
    from peft_fast.ops.operators import OPERATORS

    assert set(planner.LORA_LAUNCHES) <= set(OPERATORS["lora_mixed"].names)


# Time of an operation


@pytest.mark.parametrize(
    ("flops", "moved", "launches", "seconds", "bound"),
    [
        (8e14, 3e11, 0, 1.0, "compute"),
        (8e13, 3e12, 0, 1.0, "memory"),
        (8e14, 3e12, 10, 1.0 + 2e-5, "memory"),  # as long as each other
        (8e8, 3e6, 1, 3e-6, "launches"),
        (0, 0, 0, 0, "memory"),
    ],
)
def test_predicted_seconds(flops: float, moved: float, launches: float, seconds: float, bound: str) -> None:
    machine = replace(PLAIN, launch_seconds=2e-6)
    taken, why = predicted_seconds(flops, moved, machine, launches=launches)
    assert (taken, why) == (pytest.approx(seconds), bound)


def test_the_plan_uses_it_for_every_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "predicted_seconds", lambda *_: (1.0, "compute"))
    work = Workload(2, adapters=2)
    assert step(LLAMA, work, PLAIN).seconds["compute"] == sum(op.times for op in operations(LLAMA, work))


def test_measured_ceilings() -> None:
    ceilings = {"bytes": 2.5e10, "bf16": 2e11, "fp32": 1e11, "call": 1e-6}  # as a result file has them
    machine = Machine.measured("this CPU", ceilings)
    assert machine.launch_seconds == machine.eager_launch_seconds == 1e-6
    assert predicted_seconds(0, ceilings["bytes"], machine) == (pytest.approx(1), "memory")
    assert predicted_seconds(ceilings["fp32"], 0, machine, "fp32") == (pytest.approx(1), "compute")
    with pytest.raises(ValueError, match="no rate for 'fp16', only for bf16, fp32"):
        predicted_seconds(1, 1, machine, "fp16")
    with pytest.raises(ValueError, match='must have "bytes"'):
        Machine.measured("odd", {"bf16": 1.0})
    with pytest.raises(ValueError, match="positive"):
        Machine.measured("odd", {"bytes": 0.0, "bf16": 1.0})
    card = Machine.measured("a card", {"bytes": 3e12, "bf16": 8e14}, like=GPUS["H100"])
    assert card.memory_bytes == 80e9 and card.bytes_per_second == 3e12
    assert plan(LLAMA, Workload(8, adapters=8), card).gpus == 1
    with pytest.raises(ValueError, match="no links"):
        plan(LLAMA, Workload(1), machine, 2)


def test_known_gpus() -> None:
    assert set(GPUS) == {"H100", "H200", "A100", "MI300X"}
    assert GPUS["H100"].bytes_per_second == pytest.approx(0.9 * 3.35e12)
    assert GPUS["A100"].flops_per_second["bf16"] == pytest.approx(0.8 * 312e12)
    assert GPUS["MI300X"].link_bytes_per_second == pytest.approx(0.9 * 448e9) and GPUS["MI300X"].mesh


# Several GPUs


def test_each_gpu_has_its_share() -> None:
    work = Workload(8, context=1000, adapters=8)
    one, two = memory(LLAMA, work), memory(LLAMA, work, 2)
    norms = 2 * (32 * 2 * 4096 + 4096)
    assert two["weights"] - norms == (one["weights"] - norms) / 2
    assert two["KV cache"] == one["KV cache"] / 2
    # q, k, v, gate, up keep A whole (K = 4096), o, down keep B whole (N = 4096)
    sizes = 5 * 4096 + (4096 + 2 * 1024 + 2 * 14336) / 2 + 2 * 4096 + (4096 + 14336) / 2
    assert work.adapter_bytes(LLAMA, 2) == 16 * sizes * 2 * 32


def test_key_heads_are_repeated_where_too_few() -> None:
    few = Model.from_config(config(4096, 14336, 32, 32, kv_heads=2))
    work = Workload(8, context=1000)
    caches = [memory(few, work, gpus)["KV cache"] for gpus in (1, 2, 4, 8)]
    assert caches == [caches[0], caches[0] / 2, caches[0] / 2, caches[0] / 2]
    assert [site.N for site in few.sites(8)][:3] == [512, 128, 128]


def test_all_reduces() -> None:
    work = Workload(32, tokens=10)
    taken = step(LLAMA, work, PLAIN, 4).seconds["communication"]
    assert taken == pytest.approx(64 * 2 * 3 / 4 * 320 * 4096 * 2 / 1e12)
    assert step(LLAMA, replace(work, train=True), PLAIN, 4).seconds["communication"] == pytest.approx(2 * taken)
    late = replace(PLAIN, exchange_seconds=1e-3)
    assert step(LLAMA, work, late, 4).seconds["communication"] == pytest.approx(taken + 64e-3)
    assert step(LLAMA, work, PLAIN, 1).seconds["communication"] == 0
    mesh = replace(PLAIN, mesh=True)  # 2 of 8 use one link of seven
    assert step(LLAMA, work, mesh, 8) == step(LLAMA, work, PLAIN, 8)
    assert step(LLAMA, work, mesh, 2).seconds["communication"] == pytest.approx(
        7 * step(LLAMA, work, PLAIN, 2).seconds["communication"]
    )
    assert step(LLAMA, work, replace(PLAIN, link_bytes_per_second=1e9), 8).bound == "communication"


def test_how_many_gpus() -> None:
    work = Workload(1, context=1024)
    assert fewest_gpus(MODELS["1B"], work, GPUS["A100"]) == 1
    assert fewest_gpus(LLAMA, work, GPUS["H100"]) == 1
    assert fewest_gpus(MODELS["70B"], work, GPUS["H100"]) == 2  # 141 GB, 72 each
    assert fewest_gpus(MODELS["70B"], work, GPUS["MI300X"]) == 1
    huge = MODELS["405B"]
    for gpus in (1, 2, 4, 8):
        assert plan(huge, work, GPUS["H100"], gpus).missing_bytes > 0
    with pytest.raises(
        ValueError, match=r"does not fit 8 x H100: (29|30)\.\d GB too much on each for 0.9 of its 80 GB"
    ):
        plan(huge, work, GPUS["H100"])
    assert fewest_gpus(huge, work, GPUS["H200"]) == fewest_gpus(huge, work, GPUS["MI300X"]) == 8
    assert fewest_gpus(huge, replace(work, quantize="int8"), GPUS["H100"]) == 8
    assert fewest_gpus(huge, replace(work, quantize="nf4"), GPUS["H100"]) == 4
    assert fewest_gpus(LLAMA, Workload(1, adapters=1024, rank=16), GPUS["H100"]) == 2  # 86 GB of adapters


@pytest.mark.parametrize(
    ("fields", "gpus", "message"),
    [
        (config(4096, 14336, 32, 32), 16, "more than the 8 of a box"),
        (config(4096, 14336, 32, 32), 3, "num_attention_heads 32 cannot be split over 3"),
        (config(4096, 14332, 32, 32), 8, "intermediate_size 14332 cannot"),
        (
            config(3072, 8192, 28, 24, kv_heads=6),
            4,
            "num_key_value_heads 6 can neither be split over nor repeated on 4",
        ),
    ],
)
def test_models_that_cannot_be_split(fields: dict[str, Any], gpus: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step(Model.from_config(fields), Workload(1), GPUS["H100"], gpus)


# What must always hold


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", MODELS)
def test_more_is_never_cheaper(name: str, gpu: str) -> None:
    model, machine = MODELS[name], GPUS[gpu]

    def never_less(what: Callable[[Any], float], cases: list[Any]) -> None:
        results = [what(case) for case in cases]
        assert results == sorted(results) and all(0 < result < math.inf for result in results)

    work = Workload(64, context=100, adapters=64, rank=16)
    counts = (0, 1, 2, 8, 31, 64)
    for changed in (
        [replace(work, adapters=n) for n in counts],
        [replace(work, used=n) for n in counts],
        [replace(work, rank=n) for n in (1, 8, 16, 64, 256)],
        [replace(work, context=n) for n in (0, 1, 1000, 100_000)],
        [replace(work, tokens=n) for n in (1, 2, 64, 4096)],
        [replace(work, adapter_dtype=dtype) for dtype in ("bf16", "fp32")],
        [replace(work, quantize=name) for name in ("nf4-dq", "nf4", "int8", "none")],
        [replace(work, kernels=kernels) for kernels in ("one_launch", "grouped")],
        [replace(work, targets=SITES[:n]) for n in range(1, 8)],
        [replace(work, context=0, train=train) for train in (False, True)],
        [replace(work, graph=graph) for graph in (True, False)],
        [Workload(n, adapters=8) for n in (8, 9, 64, 512)],
    ):
        never_less(lambda work: step(model, work, machine, 8).total, changed)
    for changed in (
        [replace(work, adapters=n) for n in (*counts, 128, 1024)],
        [replace(work, batch=n) for n in (1, 8, 1024)],
    ):
        never_less(lambda work: sum(memory(model, work).values()), changed)
    for train in (False, True):
        trained = Workload(64, 4, adapters=64, train=train)
        never_less(sum, [memory(model, trained, gpus).values() for gpus in (8, 4, 2, 1)])


@pytest.mark.parametrize("adapters", [0, 1, 1024])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_seconds_add_up_and_the_base_is_the_floor(name: str, train: bool, adapters: int) -> None:
    work = Workload(16, tokens=8, adapters=adapters, train=train)
    result = plan(MODELS[name], work, GPUS["MI300X"], 8)
    assert sum(result.step.seconds.values()) == result.step.total >= result.base.total
    assert (result.step.total > result.base.total) == (adapters > 0)
    assert result.step.seconds[result.step.bound] == max(result.step.seconds.values())
    # never faster than all bytes or all flops at once
    assert result.step.total >= result.step.bytes / GPUS["MI300X"].bytes_per_second
    assert result.step.total >= result.step.flops / GPUS["MI300X"].flops_per_second["bf16"]


# What cannot be


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type must be one of llama, .*got 'gpt2'"),
        ({"model_type": None}, "got None"),
        ({"hidden_size": None}, "hidden_size must be a whole number, 1 or more, got None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be .* got 0"),
        ({"vocab_size": "many"}, "vocab_size must be .* got 'many'"),
        ({"intermediate_size": True}, "intermediate_size must be .* got True"),
        ({"num_key_value_heads": 5}, "num_attention_heads 32 is no multiple of num_key_value_heads 5"),
        ({"hidden_size": 4100}, "hidden_size 4100 is no multiple of num_attention_heads 32, and no head_dim"),
    ],
)
def test_odd_configs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model.from_config({**SHAPES["8B"], **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch must be 1 or more"),
        ({"rank": 0}, "rank must be 1 or more"),
        ({"adapters": -1}, "adapters must be 0 or more"),
        ({"used": 5}, "from 0 to 4 .of 4, in 8 rows"),
        ({"adapters": 99, "used": 9}, "from 0 to 8 .of 99, in 8 rows"),
        ({"train": True, "context": 5}, "no cache"),
        ({"quantize": "int4"}, "quantize must be one of none, nf4, nf4-dq, int8, got 'int4'"),
        ({"adapter_dtype": "fp8"}, "adapter_dtype must be one of bf16, fp32"),
        ({"kernels": "magic"}, "kernels must be one of grouped, one_launch"),
        ({"targets": ()}, "got none"),
        ({"targets": ("lm_head",)}, "got lm_head"),
        ({"kernels": "one_launch", "batch": 65}, "up to 64 rows"),
        ({"kernels": "one_launch", "train": True}, "inference"),
    ],
)
def test_odd_workloads(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Workload(**{"batch": 8, "adapters": 4, **change})


# The command


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, fields in SHAPES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    (tmp_path / "text.json").write_text("hello", encoding="utf-8")
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "gpt2.json").write_text('{"model_type": "gpt2", "n_embd": 768}', encoding="utf-8")
    (tmp_path / "empty").mkdir()
    return tmp_path


def command(files: Path, name: str, *more: str) -> list[str]:
    given = {"--adapters": "8", "--batch": "8", "--gpu": "H100"}
    missing = [word for option, value in given.items() if option not in more for word in (option, value)]
    return ["plan", "--model-config", str(files / name), *missing, *more]


def test_the_pages_example_is_what_the_command_prints(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    typed, _, shown = page.split("```\n$ ", 1)[1].split("\n```", 1)[0].partition("\n")
    arguments = typed.removeprefix("peft-fast ").replace("Meta-Llama-3-8B", str(files / "8B")).split()
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == shown.strip()


def test_json_has_the_plan(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(files, "8B/config.json", "--json", "--rank", "64", "--targets", "v,q", "--context", "100")) == 0
    got = json.loads(capsys.readouterr().out)
    work = Workload(8, context=100, adapters=8, rank=64, targets=("q_proj", "v_proj"))
    expected = plan(LLAMA, work, GPUS["H100"])
    assert got["with_adapters"]["total_seconds"] == expected.step.total and got["base"]["bound"] == "memory"
    assert got["memory_bytes"]["adapters"] == 8 * work.adapter_bytes(LLAMA) and got["fits"] is True
    assert got["gpus"] == 1 and got["workload"]["used"] == 8 and got["model"]["parameters"] == LLAMA.parameters
    assert got["adapters_cost"]["seconds"] == expected.step.total - expected.base.total


def test_options_reach_the_plan(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def taken(*more: str) -> Any:
        assert main(command(files, "8B", "--json", *more)) == 0
        return json.loads(capsys.readouterr().out)

    assert taken("--gpu", "mi300", "--tensor-parallel", "4")["machine"]["name"] == "MI300X"
    got = taken("--train", "--tokens", "64", "--quantize", "nf4", "--adapter-dtype", "fp32", "--adapters-used", "3")
    work = {"train": True, "tokens": 64, "quantize": "nf4", "adapter_dtype": "fp32", "used": 3}
    assert {name: got["workload"][name] for name in work} == work
    got = taken("--eager", "--kernels", "one_launch", "--targets", "attention")
    assert got["workload"]["graph"] is False and got["workload"]["kernels"] == "one_launch"
    assert got["workload"]["targets"] == list(TARGETS["attention"])
    assert taken("--adapters", "0")["adapters_cost"]["seconds"] == 0
    assert main(command(files, "8B", "--adapters", "0")) == 0
    text = capsys.readouterr().out
    assert "adapters   none" in text and "for the adapters" not in text
    assert main(command(files, "405B", "--tensor-parallel", "4")) == 0  # asked for: shown although it does not fit
    assert "of 72.00: does not fit: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("8B", ["--gpu", "H1000"], "--gpu H1000: not known, only H100, H200, A100, MI300X"),
        ("8B", ["--rank", "0"], "--rank: must be a whole number, 1 or more, got '0'"),
        ("8B", ["--batch", "x"], "--batch"),
        ("8B", ["--adapters", "-1"], "--adapters"),
        ("8B", ["--adapters-used", "9"], "from 0 to 8"),
        ("8B", ["--targets", "q,z"], "--targets q,z: 'z' is none of all-linear"),
        ("8B", ["--targets", ""], "'' is none of"),
        ("8B", ["--quantize", "int4"], "--quantize"),
        ("8B", ["--train", "--context", "9"], "context must be 0"),
        ("8B", ["--tensor-parallel", "3"], "cannot be split over 3 GPUs"),
        ("8B", ["--tensor-parallel", "16"], "not modelled"),
        ("nothing", [], "nothing: No such file or directory"),
        ("empty", [], "config.json: No such file"),
        ("text.json", [], "text.json is not JSON"),
        ("binary.json", [], "binary.json is not JSON"),
        ("list.json", [], "list.json: model_type must be"),
        ("gpt2.json", [], "gpt2.json: model_type must be one of llama"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_values_that_cannot_be_used(
    files: Path, name: str, more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: Any = main(command(files, name, *more))
    except SystemExit as stopped:  # argparse's own
        code = stopped.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert words in captured.err and len(captured.err.strip().splitlines()) == 1


def test_nothing_has_the_memory(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(files, "405B")) == 1
    captured = capsys.readouterr()
    assert "does not fit 8 x H100" in captured.err and "Quantize" in captured.err
    assert captured.out == "" and len(captured.err.strip().splitlines()) == 1


def test_no_torch_is_imported(files: Path) -> None:
    run = f"main({command(files, '8B')!r})"
    code = f"import sys; from peft_fast.cli.main import main; {run}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode == 0
