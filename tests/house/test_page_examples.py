"""The examples of PEFT's documentation page of the model classes; the bases are made from their configurations."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from peft_fast import (
    LoraConfig,
    PeftConfig,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    PrefixTuningConfig,
    get_peft_config,
)

# what "t5-base" and "bert-base-cased" are on the hub
T5_BASE = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "vocab_size": 32128}
BERT_BASE = {"vocab_size": 28996}


def on_meta(name: str, config: Any) -> Any:
    """A model of real size without its memory."""
    with torch.device("meta"):
        return getattr(transformers, name)(config)


def test_seq2seq(capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "inference_mode": False,
        "r": 8,
        "target_modules": ["q", "v"],
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "fan_in_fan_out": False,
        "enable_lora": None,
        "bias": "none",
    }
    with pytest.warns(UserWarning, match="enable_lora"):
        peft_config = get_peft_config(config)
    assert "enable_lora" in config  # the caller's dictionary is left alone
    model = on_meta("T5ForConditionalGeneration", transformers.T5Config(**T5_BASE))
    peft_model = PeftModelForSeq2SeqLM(model, peft_config)
    peft_model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 884,736 || all params: 223,")


def test_question_answering(capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "peft_type": "LORA",
        "task_type": "QUESTION_ANS",
        "inference_mode": False,
        "r": 16,
        "target_modules": ["query", "value"],
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "fan_in_fan_out": False,
        "bias": "none",
    }
    peft_config = get_peft_config(config)
    model = on_meta("BertForQuestionAnswering", transformers.BertConfig(**BERT_BASE))
    peft_model = PeftModelForQuestionAnswering(model, peft_config)
    peft_model.print_trainable_parameters()
    # the page's 592900 counts the head twice
    assert capsys.readouterr().out == "trainable params: 591,362 || all params: 108,312,580 || trainable%: 0.5460\n"
    assert peft_model.cls_layer_name == "qa_outputs" and peft_model.config is model.config


def test_feature_extraction(capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "inference_mode": False,
        "r": 16,
        "target_modules": ["query", "value"],
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "fan_in_fan_out": False,
        "bias": "none",
    }
    peft_config = get_peft_config(config)
    model = on_meta("BertModel", transformers.BertConfig(**BERT_BASE))
    peft_model = PeftModelForFeatureExtraction(model, peft_config)
    peft_model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 589,824 || all params: 108,")


PREFIX = {
    "peft_type": "PREFIX_TUNING",
    "inference_mode": False,
    "num_virtual_tokens": 20,
    "token_dim": 768,
    "num_transformer_submodules": 1,
    "num_attention_heads": 12,
    "num_layers": 12,
    "encoder_hidden_size": 768,
    "prefix_projection": False,
    "postprocess_past_key_value_function": None,
}


@pytest.mark.parametrize(
    ("cls", "base", "task_type"),
    [
        (PeftModelForSequenceClassification, "BertForSequenceClassification", "SEQ_CLS"),
        (PeftModelForTokenClassification, "BertForTokenClassification", "TOKEN_CLS"),
    ],
)
def test_prefix_tuning_of_bert(cls: Any, base: str, task_type: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="postprocess_past_key_value_function"):
        peft_config = get_peft_config({**PREFIX, "task_type": task_type})
    peft_model = cls(on_meta(base, transformers.BertConfig(**BERT_BASE)), peft_config)
    peft_model.print_trainable_parameters()
    printed = capsys.readouterr().out
    assert printed.startswith("trainable params: 370,178 || all params: 108,")
    oracle = getattr(peft, cls.__name__)(
        on_meta(base, transformers.BertConfig(**BERT_BASE)),
        peft.PrefixTuningConfig(**{k: v for k, v in PREFIX.items() if k[:4] != "post"}, task_type=task_type),
    )
    oracle.print_trainable_parameters()
    assert printed == capsys.readouterr().out


def test_prefix_tuning_of_gpt2_large(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"token_dim": 1280, "num_attention_heads": 20, "num_layers": 36, "encoder_hidden_size": 1280}
    with pytest.warns(UserWarning, match="postprocess_past_key_value_function"):
        peft_config = get_peft_config({**PREFIX, **sizes, "task_type": "CAUSAL_LM"})
    model = on_meta("GPT2LMHeadModel", transformers.GPT2Config(n_embd=1280, n_layer=36, n_head=20))
    PeftModelForCausalLM(model, peft_config).print_trainable_parameters()
    printed = capsys.readouterr().out
    assert printed == "trainable params: 1,843,200 || all params: 775,873,280 || trainable%: 0.2376\n"


def test_prefix_configuration_is_pefts(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="postprocess_past_key_value_function"):
        config = get_peft_config({**PREFIX, "task_type": "SEQ_CLS"})
    known = {key: value for key, value in PREFIX.items() if key != "postprocess_past_key_value_function"}
    assert config.to_dict() == peft.get_peft_config({**known, "task_type": "SEQ_CLS"}).to_dict()
    peft.PrefixTuningConfig(**{**known, "task_type": "SEQ_CLS"}).save_pretrained(tmp_path)
    assert isinstance(PeftConfig.from_pretrained(tmp_path), PrefixTuningConfig)


@pytest.mark.parametrize("key", ["enable_lora", "postprocess_past_key_value_function"])
def test_legacy_keys(key: str) -> None:
    with pytest.warns(UserWarning, match=key):
        config = get_peft_config({"peft_type": "LORA", "r": 4, key: None})
    assert config == LoraConfig(r=4)
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{key}'"):
        get_peft_config({"peft_type": "LORA", key: [True]})


def test_get_peft_config_is_strict_otherwise() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'rank'"):
        get_peft_config({"peft_type": "LORA", "rank": 4})
    with pytest.raises(KeyError, match="NOTHING"):
        get_peft_config({"peft_type": "NOTHING"})
    with pytest.raises(KeyError, match="peft_type"):
        get_peft_config({"r": 4})


def test_every_method_and_attribute_of_the_page() -> None:
    """The names that the page documents; those of prompt learning say whose they are."""
    for cls in (PeftModelForSequenceClassification, PeftModelForTokenClassification, PeftModelForCausalLM):
        for name in (
            "create_or_update_model_card", "disable_adapter", "forward", "from_pretrained", "get_base_model",
            "get_nb_trainable_parameters", "get_prompt", "get_prompt_embedding_to_save", "print_trainable_parameters",
            "save_pretrained", "set_adapter", "push_to_hub",
        ):  # fmt: skip
            assert callable(getattr(cls, name))
    model = on_meta("BertForSequenceClassification", transformers.BertConfig(**BERT_BASE, num_hidden_layers=1))
    peft_model = PeftModelForSequenceClassification(model, LoraConfig(task_type="SEQ_CLS"))
    assert peft_model.base_model.model is model and list(peft_model.peft_config) == ["default"]
    assert peft_model.modules_to_save == {"classifier", "score"} and peft_model.cls_layer_name == "classifier"
    for name in ("prompt_encoder", "prompt_tokens", "transformer_backbone_name", "word_embeddings"):
        with pytest.raises(AttributeError, match="prompt learning"):
            getattr(peft_model, name)
        assert not hasattr(peft_model, name)
    with pytest.raises(AttributeError, match="prompt learning"):
        peft_model.get_prompt(batch_size=2)
    with pytest.raises(AttributeError, match="prompt learning"):
        peft_model.get_prompt_embedding_to_save("default")
