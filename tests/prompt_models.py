"""Tiny models with the same prompt-learning adapters in peft and in peft_fast, and what is compared between them."""

import copy
import warnings
from typing import Any

import families
import peft
import torch
import transformers
from torch import Tensor, nn

import peft_fast

VOCAB = 60
TOKENS = 4  # virtual ones
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}  # two query heads share a key head
_ENCODER = families.FAMILIES["bert"][1]
_WINDOWS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}

# family -> (prefix of its classes, configuration); the sliding windows are shorter than prefix and text together
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (prefix, settings) for name, (prefix, settings, _) in families.FAMILIES.items()},
    "llama": ("Llama", _GROUPED),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen3": ("Qwen3", _GROUPED | {"head_dim": 16}),
    "mistral": ("Mistral", _GROUPED | {"sliding_window": 6}),
    "mixtral": ("Mixtral", _GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "gemma": ("Gemma", _GROUPED | {"head_dim": 8, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2", _GROUPED | _WINDOWS | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3", _GROUPED | _WINDOWS | {"query_pre_attn_scalar": 8}),
    "phi": ("Phi", _GROUPED),
    "phi3": ("Phi3", _GROUPED),
    "olmo2": ("Olmo2", _GROUPED),
    "cohere": ("Cohere", _GROUPED),
    "granite": ("Granite", _GROUPED),
    "starcoder2": ("Starcoder2", _GROUPED | {"sliding_window": 6}),
    "gpt_oss": ("GptOss", _GROUPED | _WINDOWS | {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "gpt_bigcode": (
        "GPTBigCode",
        families.FAMILIES["gpt2"][1] | {"n_inner": 48, "attn_pdrop": 0.0},
    ),
    "gpt_neox": ("GPTNeoX", _SIZES | {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "opt": ("OPT", families.FAMILIES["opt"][1] | {"attention_dropout": 0.0, "pad_token_id": 1}),
    "electra": ("Electra", _ENCODER | {"embedding_size": 16}),
    "xlm_roberta": ("XLMRoberta", _ENCODER | {"pad_token_id": 1}),
    "rembert": (
        "RemBert",
        _ENCODER | {"input_embedding_size": 32, "output_embedding_size": 32, "classifier_dropout_prob": 0.0},
    ),
    "megatron_bert": ("MegatronBert", _ENCODER),
    "t5": ("T5", families.FAMILIES["t5"][1] | {"num_layers": 3, "pad_token_id": 0, "eos_token_id": 2}),
    "bart": (
        "Bart",
        families.FAMILIES["bart"][1]
        | {"encoder_layers": 3, "decoder_layers": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        | {"decoder_start_token_id": 2},
    ),
    # without transformers' attention interface
    "bloom": ("Bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0}),
    "falcon": (
        "Falcon",
        {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
        | {"new_decoder_architecture": True, "num_kv_heads": 4},
    ),
    "gptj": (
        "GPTJ",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt_neo": (
        "GPTNeo",
        {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
        | {"attention_types": [[["global", "local"], 1]], "window_size": 6, "intermediate_size": 48}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "codegen": (
        "CodeGen",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "mpt": ("Mpt", {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    # encoders that cannot have one
    "deberta_v2": ("DebertaV2", _ENCODER | {"pooler_dropout": 0.0, "pooler_hidden_size": 32}),
    "mpnet": ("MPNet", _ENCODER),
    "fnet": ("FNet", _ENCODER),
    # and that PEFT cannot give one
    "distilbert": (
        "DistilBert",
        {"vocab_size": VOCAB, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
        | {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "qa_dropout": 0.0},
    ),
    "albert": ("Albert", _ENCODER | {"embedding_size": 16, "classifier_dropout_prob": 0.0}),
    "modernbert": (
        "ModernBert",
        _SIZES | {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
}
_CLASSES = {
    ("gpt2", "CAUSAL_LM"): "GPT2LMHeadModel",
    ("gemma3", "FEATURE_EXTRACTION"): "Gemma3TextModel",
}
_CONFIGS = {"gemma3": "Gemma3TextConfig"}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "prefix": ("PrefixTuningConfig", {}),
    "projection": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 12}),
    "prompt": ("PromptTuningConfig", {}),
    "p-mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 12}),
    "p-lstm": (
        "PromptEncoderConfig",
        {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12, "encoder_num_layers": 2},
    ),
    "multitask": ("MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2}),
}


def make_base(family: str, task: str, **changes: Any) -> Any:
    """A new base model in eval mode, always with the same weights, none of them 0, large enough to matter."""
    prefix, settings = FAMILIES[family]
    config = getattr(transformers, _CONFIGS.get(family, f"{prefix}Config"))(**settings | changes)
    config._experts_implementation = "eager"  # the other one of transformers has no fp64
    torch.manual_seed(7)
    model = getattr(transformers, _CLASSES.get((family, task), prefix + families._SUFFIX[task]))(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def make_config(library: Any, method: str, task: str | None, **changes: Any) -> Any:
    name, settings = METHODS[method]
    return getattr(library, name)(**{"num_virtual_tokens": TOKENS, "task_type": task} | settings | changes)


def randomize(model: nn.Module, seed: int = 5) -> None:
    """Random values in everything that belongs to a prompt, and in the heads that are trained with it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "prompt_encoder" in name or "modules_to_save" in name or "lora_" in name:
                scale = 0.25 if "lora_" in name else 0.7
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def adapt(library: Any, base: nn.Module, task: str | None, adapters: dict[str, tuple[str, dict[str, Any]]]) -> Any:
    """A PeftModel of `library` over a copy of `base` with random adapters (name -> method and settings), the first one
    active, in eval mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        configs = {name: make_config(library, method, task, **more) for name, (method, more) in adapters.items()}
        first, *others = configs
        model = library.get_peft_model(copy.deepcopy(base), configs[first], adapter_name=first)
        for name in others:
            model.add_adapter(name, configs[name])
    randomize(model)
    return about_the_text(model).eval()


def about_the_text(model: Any) -> Any:
    """A model of peft's whose outputs leave out the virtual tokens before the text, as ours do; ours as it is."""
    if isinstance(model, peft.PeftModel):
        model.register_forward_hook(_leave_out, with_kwargs=True)
    return model


def _leave_out(model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    config = model.active_peft_config
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind == "PREFIX_TUNING" or not config.is_prompt_learning:
        return output
    text = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    virtual, is_seq2seq = config.num_virtual_tokens, model.base_model.config.is_encoder_decoder
    for key in [key for key in output if key.endswith(("logits", "last_hidden_state"))]:
        value = output[key]
        of_text = not is_seq2seq or key.startswith("encoder_")
        length = text.shape[1] if of_text else kwargs["labels"].shape[1]
        if (of_text or config.num_transformer_submodules == 2) and value.shape[1] == virtual + length:
            output[key] = value[:, virtual:]
    return output


def make_pair(
    family: str,
    task: str,
    method: str = "prefix",
    adapters: dict[str, tuple[str, dict[str, Any]]] | None = None,
    base: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[Any, Any]:
    """(peft's model, peft_fast's model): the same base, the same random adapters under the same names."""
    adapters = {"default": (method, changes)} if adapters is None else adapters
    model = make_base(family, task, **base or {})
    theirs, ours = (adapt(library, model, task, adapters) for library in (peft, peft_fast))
    copy_weights(theirs, ours)
    return theirs, ours


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy every parameter by its name, which both models must have."""
    from_, to = dict(source.named_parameters()), dict(target.named_parameters())
    assert from_.keys() == to.keys()
    with torch.no_grad():
        for name, parameter in to.items():
            parameter.copy_(from_[name])


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the base's embedding a second time, which peft's has and no file of tensors could hold."""
    return {name: tensor for name, tensor in model.state_dict().items() if name != "word_embeddings.weight"}


def in_fp64(model: Any) -> Any:
    return copy.deepcopy(model).double()


def prefix_of(model: Any, name: str = "default") -> nn.Parameter:
    """The learned numbers of an adapter without projection."""
    weight: nn.Parameter = model.prompt_encoder[name].embedding.weight
    return weight


def batch(task: str, padding: str = "none", rows: int = 3, length: int = 7, seed: int = 3) -> dict[str, Tensor]:
    """Token ids with the labels of the task. padding: "none" (no mask), "left", "right" (all rows but the first)."""
    generator = torch.Generator().manual_seed(seed)

    def ids(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    inputs = {"input_ids": ids(VOCAB, rows, length, low=3)}
    if padding != "none":
        inputs["attention_mask"] = torch.ones(rows, length, dtype=torch.long)
        for row in range(1, rows):
            inputs["attention_mask"][row, slice(0, row) if padding == "left" else slice(-row, None)] = 0
    if task == "CAUSAL_LM":
        inputs["labels"] = ids(VOCAB, rows, length, low=3)
        inputs["labels"][0, 2] = -100
    elif task == "SEQ_2_SEQ_LM":
        inputs["labels"] = ids(VOCAB, rows, length - 2, low=3)
    elif task == "SEQ_CLS":
        inputs["labels"] = ids(2, rows)
    elif task == "TOKEN_CLS":
        inputs["labels"] = ids(2, rows, length)
    elif task == "QUESTION_ANS":
        inputs["start_positions"], inputs["end_positions"] = ids(length, rows), ids(length, rows)
    return inputs


def run(model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
    """Output tensors, the loss among them, and the gradient of every trainable parameter that has one."""
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = model(**inputs, **kwargs)
    values = families.output_tensors(output)
    generator = torch.Generator().manual_seed(9)
    total = sum(
        (value.double() * torch.randn(value.shape, generator=generator, dtype=torch.float64)).sum()
        for value in values.values()
        if value.requires_grad
    )
    if isinstance(total, Tensor):
        total.backward()
    values = {key: value.detach() for key, value in values.items()}
    return values | {f"grad of {key}": value.clone() for key, value in families.gradients(model).items()}


def assert_runs_as_accurate(got: dict[str, Tensor], same: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """For results of `run`: the root mean square error of all numbers, each in units of the largest in its tensor, is
    at most twice that of `same`. That of a single small tensor is a matter of luck."""
    assert got.keys() == same.keys() == exact.keys()
    assert all(got[name].shape == exact[name].shape for name in exact)
    scales = {name: value.abs().max().item() for name, value in exact.items()}
    names = [name for name, scale in scales.items() if scale > 1e-12 * max(scales.values())]
    errors = [
        torch.cat([((values[name].double() - exact[name]) / scales[name]).flatten() for name in names]).square().mean()
        for values in (got, same)
    ]
    eps = max(torch.finfo(value.dtype).eps for value in got.values())
    error, budget = errors[0].sqrt().item(), 2 * errors[1].sqrt().item() + eps
    assert error <= budget, f"error {error:.3e} > budget {budget:.3e}"


def generate(
    model: Any, inputs: dict[str, Tensor], new: int = 6, seed: int = 1, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """(tokens, the scores of each step) of `new` new tokens."""
    torch.manual_seed(seed)
    inputs = {key: value for key, value in inputs.items() if key != "labels"}
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0} | kwargs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)
    return output.sequences, torch.stack(output.logits)
