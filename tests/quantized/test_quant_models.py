"""Models on quantized bases beside peft: logits, losses, gradients, tokens, files, merging; and where peft is wrong."""

import copy
import threading
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import peft_fast
from peft_fast.quantized import weights as quant
from peft_fast.tuners.lora.bnb import Linear4bit, Linear8bitLt

KINDS: dict[str, dict[str, Any]] = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-dq": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": dict(load_in_8bit=True),
}
IDS = torch.randint(3, 256, (3, 11), generator=torch.Generator().manual_seed(0))
SIZES = dict(vocab_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
pytestmark = pytest.mark.filterwarnings(
    "ignore:MatMul8bitLt", "ignore:.*may get different generations", "ignore:.*is_gradient_checkpointing"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in full precision."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(hidden_size=128, **SIZES)).save_pretrained(path)
    return path


def load(directory: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    compute = {"bnb_4bit_compute_dtype": dtype} if kind != "int8" else {}
    config = BitsAndBytesConfig(**KINDS[kind], **compute)
    return LlamaForCausalLM.from_pretrained(directory, quantization_config=config, dtype=dtype)


def adapted(lib: ModuleType, base: Any, names: tuple[str, ...] = ("default",), **changes: Any) -> Any:
    """The base with adapters whose weights depend on their names only."""
    config: dict[str, Any] = dict(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    base = lib.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = None
    for name in names:
        settings = lib.LoraConfig(**(config | changes))
        if model is None:
            model = lib.get_peft_model(base, settings, adapter_name=name)
        else:
            model.add_adapter(name, settings)
    generator = torch.Generator()
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            generator.manual_seed(sum(key.encode()))
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def training_step(model: Any, autocast: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def logits(model: Any, **kwargs: Any) -> Tensor:
    return model.eval()(input_ids=IDS, **kwargs).logits


@pytest.mark.parametrize("kind", KINDS)
def test_loss_gradients_logits_and_tokens_are_pefts(directory: Path, kind: str) -> None:
    theirs, mine = (adapted(lib, load(directory, kind)) for lib in (peft, peft_fast))
    kinds = {type(m) for m in mine.modules() if isinstance(m, Linear4bit | Linear8bitLt)}
    assert kinds == {Linear8bitLt if kind == "int8" else Linear4bit}
    (loss, gradients), (their_loss, their_gradients) = training_step(mine), training_step(theirs)
    torch.testing.assert_close(loss, their_loss)
    assert gradients.keys() == their_gradients.keys() and len(gradients) == 28
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )
    torch.testing.assert_close(logits(mine), logits(theirs), rtol=1e-5, atol=1e-5)
    with mine.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(logits(mine), logits(theirs))
    mask = torch.ones_like(IDS)
    tokens = [m.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=6, do_sample=False) for m in (mine, theirs)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_within_pefts_error(directory: Path, kind: str, autocast: bool) -> None:
    """The measure is fp32 on the same quantized weights; activations in bf16, or fp32 under autocast."""
    exact = adapted(peft_fast, load(directory, kind))
    _, right = training_step(exact)
    errors = []
    for lib in (peft_fast, peft):
        model = adapted(lib, load(directory, kind, torch.bfloat16))
        if not autocast:  # the rest of the model in bf16 too
            for module in model.modules():
                if not list(module.children()) and "bitsandbytes" not in type(module).__module__:
                    module.to(torch.bfloat16)
        _, gradients = training_step(model, autocast)
        assert gradients.keys() == right.keys()
        total = sum(((gradients[n].double() - g.double()).norm() / g.double().norm()) ** 2 for n, g in right.items())
        errors.append((float(total) / len(right)) ** 0.5)
    assert errors[0] <= 2 * errors[1], errors


def test_activations_in_another_dtype_than_the_layer_computes_in(directory: Path) -> None:
    """fp32 activations over a base that computes in bf16: the adapters stay in fp32, as in peft."""
    results = []
    for lib in (peft, peft_fast):
        base = load(directory, "nf4")
        for module in base.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                module.compute_dtype = torch.bfloat16
        results.append(training_step(adapted(lib, base))[1])
    for name, gradient in results[0].items():
        assert (results[1][name] - gradient).norm() <= 1e-3 * gradient.norm(), name


@pytest.mark.parametrize("kind", ["nf4-dq", "int8"])
def test_20_steps_lose_what_pefts_lose(directory: Path, kind: str) -> None:
    curves = []
    for lib in (peft, peft_fast):
        model = adapted(lib, load(directory, kind)).train()
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
        curve = []
        for _ in range(20):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[1][-1] < 0.9 * curves[1][0]
    torch.testing.assert_close(*curves, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after_evaluation", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_merging_is_right_before_and_after_an_evaluation(
    directory: Path, kind: str, after_evaluation: bool, safe: bool
) -> None:
    """The merged weight is the quantized sum. peft's is not, after bitsandbytes packed its weights."""
    model = adapted(peft_fast, load(directory, kind))
    site = model.base_model.model.model.layers[1].mlp.down_proj
    base = copy.deepcopy(site.base_layer)
    quant.write(base, quant.read(base) + site.get_delta_weight("default"))
    if after_evaluation:
        before = logits(model)
    with pytest.warns(UserWarning, match="may get different generations due to rounding errors"):
        model.merge_adapter(safe_merge=safe)
    assert torch.equal(quant.read(site.base_layer), quant.read(base))
    if after_evaluation:
        merged = logits(model)
        assert (merged - before).norm() < 0.35 * before.norm()
        # and with the merged weights packed in their turn
        model.unmerge_adapter()
        quant.write(base, quant.read(base) - site.get_delta_weight("default"))
        assert torch.equal(quant.read(site.base_layer), quant.read(base))


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unload_then_save(directory: Path, kind: str, tmp_path: Path) -> None:
    model = adapted(peft_fast, load(directory, kind))
    logits(model)
    merged = model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_modules())
    expected = {n: quant.read(m) for n, m in merged.named_modules() if quant.kind_of(m)}
    assert len(expected) == 14
    merged.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    for name, w in expected.items():
        torch.testing.assert_close(quant.read(again.get_submodule(name)), w, rtol=0, atol=0)


def test_a_broken_adapter_is_not_merged_safely(directory: Path) -> None:
    model = adapted(peft_fast, load(directory, "nf4"))
    site = model.base_model.model.model.layers[0].self_attn.q_proj
    site.lora_B["default"].weight.data[0, 0] = float("nan")
    bits = site.base_layer.weight.data.clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(site.base_layer.weight.data, bits) and not site.merged


@pytest.mark.parametrize("kind", KINDS)
def test_training_after_an_evaluation(directory: Path, kind: str) -> None:
    """With bitsandbytes' weights packed for a CPU, peft's layers give no gradient to what is below them."""
    first, second = (adapted(peft_fast, load(directory, kind)) for _ in range(2))
    logits(first)
    (loss, gradients), (expected_loss, expected) = training_step(first), training_step(second)
    assert torch.equal(loss, expected_loss)
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "fp4"])
def test_rows_that_are_no_whole_blocks(tmp_path: Path, kind: str) -> None:
    """Sizes that bitsandbytes 0.50.2 gets wrong on CPUs: training, inference, mixed batches and merging are right."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(hidden_size=96, **(SIZES | {"intermediate_size": 160}))).save_pretrained(tmp_path)
    model = adapted(peft_fast, load(tmp_path, kind))
    plain = LlamaForCausalLM(LlamaConfig(hidden_size=96, **(SIZES | {"intermediate_size": 160}))).float()
    with torch.no_grad():
        for name, module in model.base_model.model.named_modules():
            if isinstance(module, Linear4bit):
                plain.get_submodule(name).weight.copy_(quant.read(module.base_layer))
            elif name and not list(module.children()) and ".lora" not in name and not name.endswith("base_layer"):
                for key, parameter in module.named_parameters():
                    plain.get_submodule(name).get_parameter(key).copy_(parameter)
    oracle = adapted(peft, plain)
    (loss, gradients), (their_loss, theirs) = training_step(model), training_step(oracle)
    torch.testing.assert_close(loss, their_loss)
    for name, gradient in theirs.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits(model), logits(oracle), rtol=1e-4, atol=1e-5)
    names = ["default", "__base__", "default"]
    torch.testing.assert_close(
        logits(model, adapter_names=names), logits(oracle, adapter_names=names), rtol=1e-4, atol=1e-5
    )
    with model.disable_adapter(), oracle.disable_adapter():
        torch.testing.assert_close(logits(model), logits(oracle), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_batches_are_pefts(directory: Path, kind: str) -> None:
    theirs, mine = (adapted(lib, load(directory, kind), ("a", "b")) for lib in (peft, peft_fast))
    names = ["b", "__base__", "a"]
    torch.testing.assert_close(
        logits(mine, adapter_names=names), logits(theirs, adapter_names=names), rtol=1e-4, atol=1e-5
    )
    mask = torch.ones_like(IDS)
    arguments = dict(input_ids=IDS, attention_mask=mask, max_new_tokens=5, do_sample=False, adapter_names=names)
    assert torch.equal(mine.generate(**arguments), theirs.generate(**arguments))


@pytest.mark.parametrize("kind", ["nf4-dq", "int8"])
def test_files_go_both_ways(directory: Path, kind: str, tmp_path: Path) -> None:
    mine = adapted(peft_fast, load(directory, kind))
    mine.save_pretrained(tmp_path / "mine")
    theirs = peft.PeftModel.from_pretrained(load(directory, kind), tmp_path / "mine")
    torch.testing.assert_close(logits(theirs), logits(mine), rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = peft_fast.PeftModel.from_pretrained(load(directory, kind), tmp_path / "theirs")
    assert torch.equal(logits(again), logits(mine))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("method", ["prefix", "prompt", "p-tuning"])
def test_prompt_learning(directory: Path, kind: str, method: str) -> None:
    results = []
    for lib in (peft, peft_fast):
        make = dict(prefix=lib.PrefixTuningConfig, prompt=lib.PromptTuningConfig)
        make["p-tuning"] = lambda lib=lib, **k: lib.PromptEncoderConfig(encoder_hidden_size=32, **k)
        base = lib.prepare_model_for_kbit_training(load(directory, kind), use_gradient_checkpointing=False)
        model = lib.get_peft_model(base, make[method](num_virtual_tokens=4, task_type="CAUSAL_LM"))
        generator = torch.Generator().manual_seed(1)
        for parameter in model.prompt_encoder.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        loss, gradients = training_step(model)
        results.append((loss, list(gradients.values()), logits(model)))
    (their_loss, theirs, their_logits), (loss, mine, my_logits) = results
    torch.testing.assert_close(loss, their_loss)
    for gradient, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)
    # peft's begin with those of the virtual tokens
    torch.testing.assert_close(my_logits, their_logits[:, -my_logits.shape[1] :], rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:bitsandbytes packed this")
@pytest.mark.parametrize("method", ["prefix", "q_proj"])
def test_layers_without_an_adapter_pass_gradients_after_an_evaluation(directory: Path, method: str) -> None:
    """bitsandbytes packs them by itself; in peft nothing below them learns from then on, and nothing says so."""
    config: Any = peft_fast.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    if method != "prefix":
        config = peft_fast.LoraConfig(r=4, target_modules=[method], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft_fast.get_peft_model(load(directory, "nf4"), config)
    _, expected = training_step(model)
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    model.zero_grad()
    logits(model)
    _, gradients = training_step(model)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0
        assert (gradients[name] - gradient).norm() <= 0.05 * gradient.norm(), name


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(directory: Path, reentrant: bool) -> None:
    plain = adapted(peft_fast, load(directory, "nf4-dq"))
    base = peft_fast.prepare_model_for_kbit_training(
        load(directory, "nf4-dq"), gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    assert base.is_gradient_checkpointing
    theirs = peft.prepare_model_for_kbit_training(
        load(directory, "nf4-dq"), gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    requires = [m.get_input_embeddings()(IDS).requires_grad for m in (base, theirs)]
    assert requires[0] == requires[1] and (requires[0] or not reentrant)
    model = adapted(peft_fast, base)
    (loss, gradients), (expected_loss, expected) = training_step(model), training_step(plain)
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient)


def test_preparing_casts_and_freezes_as_peft_does(directory: Path) -> None:
    for kind in ("nf4", "int8"):
        mine = peft_fast.prepare_model_for_kbit_training(load(directory, kind, torch.bfloat16))
        theirs = peft.prepare_model_for_kbit_training(load(directory, kind, torch.bfloat16))
        for (name, a), (_, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
            assert (a.dtype, a.requires_grad) == (b.dtype, b.requires_grad), name
        assert mine.is_gradient_checkpointing and theirs.is_gradient_checkpointing


def test_codes_stored_in_16_bits_are_not_cast(directory: Path) -> None:
    config = BitsAndBytesConfig(**KINDS["nf4"], bnb_4bit_quant_storage=torch.bfloat16)
    base = LlamaForCausalLM.from_pretrained(directory, quantization_config=config)
    model = adapted(peft_fast, base)
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(training_step(model)[0], training_step(adapted(peft_fast, load(directory, "nf4")))[0])


def test_evaluation_in_threads(directory: Path) -> None:
    """The first forward packs weights: threads that come at once see whole ones."""
    model = adapted(peft_fast, load(directory, "nf4"), ("a", "b")).eval()
    expected = {}
    for name in ("a", "b"):
        other = adapted(peft_fast, load(directory, "nf4"), ("a", "b")).eval()
        expected[name] = logits(other, adapter_names=[name] * 3)
    wrong: list[str] = []

    def work(name: str) -> None:
        for _ in range(5):
            if not torch.allclose(logits(model, adapter_names=[name] * 3), expected[name], atol=1e-5):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b", "a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_base_with_hooks_or_a_patched_forward_is_called(directory: Path) -> None:
    model = adapted(peft_fast, load(directory, "nf4"))
    site = model.base_model.model.model.layers[0].self_attn.q_proj
    seen: list[int] = []
    handle = site.base_layer.register_forward_hook(lambda *args: seen.append(1))
    training_step(model)
    logits(model)
    assert len(seen) == 2
    handle.remove()
    assert site._base.is_the_librarys(site.base_layer, torch.ones(2))
    assert not site._base.is_the_librarys(site.base_layer, torch.ones(2).as_subclass(type("Traced", (Tensor,), {})))


class _Doubled(bitsandbytes.nn.Linear4bit):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("training", [True, False])
def test_a_subclass_with_another_forward_is_called(training: bool) -> None:
    layer = _Doubled(128, 64, True, torch.float32, True, "nf4")
    plain = copy.deepcopy(layer.to("cpu"))
    config = peft_fast.LoraConfig(r=4, target_modules=["0"])  # B is 0
    model = peft_fast.get_peft_model(nn.Sequential(layer), config).train(training)
    x = torch.randn(5, 128)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(model(x), plain.train(training)(x))


@pytest.mark.parametrize("kind", ["4-bit", "8-bit"])
def test_training_compiles_to_one_graph(kind: str) -> None:
    layer = (
        bitsandbytes.nn.Linear4bit(128, 64, True, torch.float32, True, "nf4")
        if kind == "4-bit"
        else bitsandbytes.nn.Linear8bitLt(128, 64, has_fp16_weights=False)
    )
    model = nn.Sequential(layer).to("cpu")
    config = peft_fast.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = peft_fast.get_peft_model(model, config).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 128).requires_grad_()
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    results = [torch.autograd.grad(run(x).square().sum(), wanted) for run in (model, compiled)]
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain)


class _Opaque(nn.Module):
    """A quantized linear layer of a library that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.infeatures, self.outfeatures, self.bias = 8, 6, None
        self.register_buffer("qweight", torch.randint(0, 100, (6, 8), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight.float() / 100).T


def test_unknown_formats_run_and_are_not_merged() -> None:
    model = nn.Sequential(_Opaque())
    base = model[0]
    wrapped = peft_fast.get_peft_model(model, peft_fast.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    site, x = wrapped.base_model.model[0], torch.randn(3, 8)
    delta = site.lora_B["default"](site.lora_A["default"](x)) * site.scaling["default"]
    torch.testing.assert_close(wrapped(x), base(x) + delta)
    with pytest.raises(ValueError, match="Cannot merge adapter 'default' into a _Opaque"):
        wrapped.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped.unload()


def test_torchao_runs_and_merges_where_its_configuration_is_known() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, **SIZES)
    results = []
    for lib in (peft, peft_fast):
        torch.manual_seed(0)
        base = LlamaForCausalLM(config)
        quantize_(base.model, Int8WeightOnlyConfig())
        base.quantization_method = "torchao"
        model = adapted(lib, base)
        results.append((training_step(model)[0], logits(model)))
        if lib is peft_fast:
            with pytest.raises(ValueError, match="how it was quantized is not known"):
                model.merge_adapter()
            before = logits(model)
            for module in model.modules():
                if hasattr(module, "get_apply_tensor_subclass"):
                    module.get_apply_tensor_subclass = Int8WeightOnlyConfig
            model.merge_adapter()
            merged = logits(model)
            assert not torch.equal(merged, before) and (merged - before).norm() < 0.1 * before.norm()
    for mine, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_torchao_loaded_by_transformers_merges_as_in_peft(directory: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    results = []
    for lib in (peft, peft_fast):
        config = TorchAoConfig(Int8WeightOnlyConfig())
        base = LlamaForCausalLM.from_pretrained(directory, quantization_config=config, dtype=torch.float32)
        model = adapted(lib, base)
        before = logits(model)
        model.merge_adapter()
        merged = logits(model)
        model.unmerge_adapter()
        results.append((before, merged, logits(model), logits(model.merge_and_unload())))
    assert not torch.equal(results[1][0], results[1][1])
    for mine, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
