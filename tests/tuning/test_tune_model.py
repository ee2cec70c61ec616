"""`peft_fast.tune`, `peft-fast tune` and `peft-fast info --model`: a model's own sites, and what its rows change."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from absent_driver import run
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import peft_fast
from csrc_triton import tables
from peft_fast import LoraConfig, PrefixTuningConfig, get_peft_model
from peft_fast.cli.main import main
from peft_fast.ops import choice
from peft_fast.tuning import case, model as models, work
from peft_fast.tuning.explain import explain

GPU = torch.device("cuda", 0)


def llama(**options: Any) -> nn.Module:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def adapted(**options: Any) -> Any:
    return get_peft_model(llama(), LoraConfig(**dict(r=8, target_modules="all-linear") | options))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The user's table in a folder of the test, and a GPU that is not there."""
    monkeypatch.setenv(tables.VARIABLE, str(tmp_path))
    monkeypatch.setattr(tables, "gpu_of", lambda device: tables.Gpu("sm_90", "Test GPU"))
    monkeypatch.setattr(choice, "triton_failure", lambda device: "")
    monkeypatch.setattr(choice, "has_triton", lambda: True)
    work.forget()
    yield tmp_path / "tables"
    monkeypatch.undo()
    work.forget()


def test_a_models_own_sites() -> None:
    model = adapted(lora_dropout=0.1)
    found = {(site.N, site.K): site for site in models.sites_of(model)}
    assert set(found) == {(64, 64), (32, 64), (160, 64), (64, 160)}
    assert {site.R for site in found.values()} == {8} and all(site.dropout for site in found.values())
    assert len(found[64, 64].names) == 4 and len(found[160, 64].names) == 4
    shapes = models.shapes_of(model, (1, 12, 300))
    assert shapes.tokens == (1, 16, 512) and shapes.trained == (512,) and shapes.dropout
    assert set(shapes.plain) == {(64, 64, 8), (32, 64, 8), (160, 64, 8), (64, 160, 8)}


def test_ranks_that_kernels_treat_alike_are_one_site_with_the_largest() -> None:
    model = adapted(r=4, target_modules=["q_proj"])
    model.add_adapter("more", LoraConfig(r=12, target_modules=["q_proj"]))
    model.add_adapter("large", LoraConfig(r=40, target_modules=["q_proj"]))
    assert sorted(site.R for site in models.sites_of(model)) == [12, 40]
    assert len(models.own_weights(model)) == 1


def test_own_weights_are_the_models_own_in_turn() -> None:
    model = adapted()
    weights = models.own_weights(model)["plain", 160, 64]
    drawn = [next(weights).data_ptr() for _ in range(5)]
    layers = [
        getattr(layer.mlp, name).base_layer.weight.data_ptr()
        for layer in model.base_model.model.model.layers
        for name in ("gate_proj", "up_proj")
    ]
    assert drawn == [*layers, layers[0]], "no copies"


def test_conv1d_keeps_its_weights_the_other_way_round() -> None:
    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16))
    model = get_peft_model(base, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    weight = next(models.own_weights(model)["plain", 96, 32])
    assert weight.shape == (96, 32) and weight.data_ptr() == base.transformer.h[0].attn.c_attn.weight.data_ptr()


def test_a_prefix_has_heads() -> None:
    model = get_peft_model(llama(), PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    shapes = models.shapes_of(model, (1,))
    assert (shapes.plain, shapes.head_sizes, shapes.heads) == ((), (16,), (4, 2))
    planned = peft_fast.tune(model, (1, 300), dry=True).planned
    assert {line.split()[0] for line in planned} == {
        "prefix_fwd", "prefix_decode", "prefix_dq", "prefix_dkv", "prefix_dprefix"
    }  # fmt: skip


def test_quantized_bases(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = llama().to(torch.bfloat16)
    for layer in model.model.layers:
        four = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float16)
        layer.self_attn.q_proj = four
        layer.self_attn.o_proj = bitsandbytes.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "o_proj"]))
    assert {site.kind: (site.N, site.K, len(site.bases)) for site in models.sites_of(model)} == {
        "4bit": (64, 64, 2), "8bit": (64, 64, 2)
    }  # fmt: skip
    assert models.dtype_of(model) == torch.float16, "what the 4-bit base computes in"
    shapes = models.shapes_of(model, (1,))
    assert (shapes.plain, shapes.four_bit, shapes.int8) == ((), ((64, 64, 8),), ((64, 64, 8),))


def test_on_a_cpu_there_is_nothing_to_tune(own: Path) -> None:
    found = peft_fast.tune(adapted())
    assert str(found) == "plain torch runs on cpu, where the model is: nothing to tune"
    assert found.written == 0 and found.planned and not own.exists()


def test_what_cannot_be_tuned_is_named(own: Path) -> None:
    with pytest.raises(ValueError, match="this LlamaForCausalLM has no linear layer with LoRA and no prefix"):
        peft_fast.tune(llama())
    for tokens in ((), (0,), (1.5,)):
        with pytest.raises(ValueError, match="positive whole numbers"):
            peft_fast.tune(adapted(), tokens)
    model = adapted()
    model.base_model.model.lm_head.to("meta")
    with pytest.raises(ValueError, match="expected a model on one device, got one on cpu, meta"):
        peft_fast.tune(model)


# ----------------------------------------------------------------------------------- measured, on a GPU that is not one
@pytest.fixture
def gpu(own: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model counts as one on a GPU; kernels of one op run in plain torch; how long they take is said here."""
    setting = case.Setting("Test GPU", torch.device("cpu"), torch.float32, "sm_90", 0, 0.0, 1, dry=False)
    seconds = {"torch": 2.0, "addmm": 3.0, "split": 1.0, "one_launch": 3.0}
    state = SimpleNamespace(seconds=seconds, settings=[], interrupt_at=None, timed=0)

    def gpu_setting(device: Any, dtype: Any, seconds: float, rounds: int, **options: Any) -> Any:
        state.settings.append(options)
        return SimpleNamespace(**{**vars(setting), "own": options["own"]})

    def measured(on: Any, made: Any) -> Any:
        from peft_fast.tuning.measure import Outcome

        state.timed += 1
        if state.timed == state.interrupt_at:
            raise KeyboardInterrupt
        best = min(
            (name for name in made.names if name in seconds), key=lambda name: seconds[name], default=made.names[0]
        )
        gain = seconds.get(made.names[0], 1.0) / seconds.get(best, 1.0)
        return Outcome(dict(implementation=best, gain=gain), best, [], best == made.names[0])

    monkeypatch.setattr(models, "device_of", lambda model: GPU)
    monkeypatch.setattr(peft_fast.tuning, "triton_failure", lambda device: "")
    monkeypatch.setattr(peft_fast.tuning, "gpu_setting", gpu_setting)
    monkeypatch.setattr(work, "jobs", lambda shapes: [])
    monkeypatch.setattr(work, "measure_choice", measured)
    monkeypatch.setattr(work.Work, "compile", lambda self, threads, seconds=None: None)
    return state


def chosen(M: int = 1, N: int = 64, K: int = 64) -> str:
    return choice.choose("lora_linear", GPU, torch.float32, M, N, K, 8).name


def test_measured_rows_change_what_runs_and_what_info_shows(gpu: Any, own: Path) -> None:
    model = adapted(target_modules=["q_proj"])
    before = {
        line.choice for lines in explain(model, (1, 300), GPU).values() for line in lines if line.op == "lora_linear"
    }
    assert (before, chosen()) == ({"torch"}, "torch")
    found = peft_fast.tune(model, (1, 300), progress=False)
    rows = json.loads((own / "choice.json").read_text())
    assert found.written == len(rows) == 4 and found.left == 0 and found.changed >= 2
    assert str(found).startswith(f"4 rows written to {own}, ")
    assert {row["commit"] for row in rows} == {f"peft_fast {peft_fast.__version__}"}
    assert [chosen(M) for M in (1, 300, 512, 513)] == ["split", "split", "split", "torch"], "at once, in this process"
    lines = [line for lines in explain(model, (1, 300), GPU).values() for line in lines if line.op == "lora_linear"]
    assert {line.choice for line in lines} == {"split"} and "measured on Test GPU" in lines[0].reason


def test_ctrl_c_and_then_the_same_call_goes_on(gpu: Any, own: Path) -> None:
    model, gpu.interrupt_at = adapted(target_modules=["q_proj"]), 3
    with pytest.raises(KeyboardInterrupt):
        peft_fast.tune(model, (1, 300), progress=False)
    assert len(json.loads((own / "choice.json").read_text())) == 2
    assert chosen() == "split", "what is finished counts"
    found = peft_fast.tune(model, (1, 300), progress=False)
    assert (found.written, found.left) == (2, 0)
    assert peft_fast.tune(model, (1, 300), progress=False).written == 0
    assert peft_fast.tune(model, (1, 300), progress=False, again=True).written == 4


def test_when_the_time_is_over_it_says_what_is_left(gpu: Any, own: Path) -> None:
    found = peft_fast.tune(adapted(), (1, 300), seconds=0.0, progress=False)
    assert (found.written, found.left) == (0, len(found.planned))
    assert f"{found.left} are left: the same call goes on with them" in str(found)


def test_where_triton_cannot_run(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_fast.tuning, "triton_failure", lambda device: "no C compiler")
    with pytest.raises(RuntimeError, match="tune: no C compiler"):
        peft_fast.tune(adapted())


COMPILED_AHEAD = """
import json
import torch
from absent_driver import install

launched = install()
from triton import knobs
from csrc_triton.common import launch
from peft_fast.tuning import work
from peft_fast.tuning.case import Setting
from peft_fast.tuning.measure import offered_configs, trying
from peft_fast.tuning.kernels import jobs
from peft_fast.tuning.shapes import Shapes
from peft_fast.tuning.table import Provenance

compiled = []
knobs.runtime.jit_post_compile_hook = lambda *args, **kwargs: compiled.append(kwargs["repr"])
launch.torch.cuda.is_current_stream_capturing = lambda: False
shapes, cpu = Shapes(tokens=(1, 16), plain=((64, 128, 16),)), torch.device("cpu")
on = Setting("Test GPU", cpu, torch.bfloat16, "sm_90", 0, 0.0, 1, dry=False)
wanted = [task for task in work.tasks(shapes, "bfloat16") if task.of == "lora_shrink"]
run = work.Work(on, work.Path("nowhere"), Provenance("sm_90", "Test GPU", "2", "3", "x"), wanted)
run.compile(2)
ahead, so_far = len(compiled), len(launched)
for task in wanted:
    task.compile(on)  # outside of compile_only these calls launch
print(json.dumps([ahead, so_far, len(compiled), len(launched)]))
"""


def test_kernels_are_compiled_side_by_side_before_anything_is_timed(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    printed = run(COMPILED_AHEAD, TRITON_CACHE_DIR=str(tmp_path))
    ahead, launched_so_far, compiled, launched = json.loads(printed.splitlines()[-1])
    assert ahead > 1 and launched_so_far == 0, "compiled, not launched"
    assert compiled == ahead and launched > 1, "and nothing is left to compile"


# ----------------------------------------------------------------------------------------------------- the command line
@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    llama().save_pretrained(folder / "base")
    adapted(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(folder / "adapter")
    return folder


def test_tune_on_a_cpu(saved: Path, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--model", str(saved / "base")]) == 0
    assert capsys.readouterr().out == (
        "plain torch runs on cpu: there is nothing to tune. --dry shows what a GPU would measure\n"
    )
    assert not own.exists()


def test_a_dry_run_shows_what_would_be_measured(saved: Path, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(saved / "base"), "--adapter", str(saved / "adapter"), "--tokens", "1"]
    assert main(["tune", *arguments, "--dry"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert "lora_linear float32 M=1 N=64 K=64 R=4" in lines and "lora_mixed float32 M=1 N=64 K=64 R=4" in lines
    assert last == f"{len(lines)} rows would be measured and written to {own}"


def test_info_of_a_model(saved: Path, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", str(saved / "base"), "--tokens", "1", "2048"]) == 0
    out = capsys.readouterr().out
    assert "o_proj, q_proj: 4 layers of 64 x 64, float32, rank 16" in out
    assert "cpu tensors take plain torch" in out and "lora_mixed" in out and f"0 of your own in {own}" in out
    assert main(["info", "--model", str(saved / "base"), "--adapter", str(saved / "adapter")]) == 0
    assert "q_proj: 2 layers of 64 x 64, float32, rank 4" in capsys.readouterr().out


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_info_of_a_model_to_be_quantized(saved: Path, capsys: pytest.CaptureFixture[str], quantize: str) -> None:
    pytest.importorskip("bitsandbytes")
    arguments = ["info", "--model", str(saved / "base"), "--quantize", quantize, "--dtype", "bfloat16", "--tokens", "1"]
    assert main(arguments) == 0
    kind = {"nf4": "4bit", "int8": "8bit"}[quantize]
    assert f"o_proj, q_proj: 4 layers of 64 x 64, {kind} base, bfloat16, rank 16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "--model", "nowhere"], "--model nowhere: expected the directory of a model, with config.json"),
        (["tune", "--model", "BASE", "--adapter", "no"], "--adapter no: expected the directory of an adapter"),
        (["tune", "--model", "BASE", "--tokens", "0"], "--tokens 0: expected at least 1"),
        (["tune", "--model", "BASE", "--r", "0"], "--r 0: expected a rank of at least 1"),
        (["info", "--adapter", "x"], "--adapter needs --model"),
    ],
    ids=str,
)
def test_a_wrong_option(saved: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(saved / "base") if word == "BASE" else word for word in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
