"""Which subject measures which kind of case."""

from ..cases import kinds as cases
from . import (  # fmt: skip
    generate_models,
    host_layer,
    lora_models,
    lora_sites,
    manage_cases,
    mixed_cases,
    mixed_decode,
    mixed_sites,
    prefix_decode,
    prefix_models,
    prefix_sites,
    quant_models,
    quant_sites,
)
from .subject import Subject

SUBJECTS: dict[type, type[Subject]] = {
    cases.OpCase: lora_sites.LoraSite,
    cases.HostCase: host_layer.HostLayer,
    cases.ModelCase: lora_models.LoraModel,
    cases.MixedCase: mixed_cases.MixedBatch,
    cases.MixedOpCase: mixed_sites.MixedLayer,
    cases.MixedDecodeCase: mixed_decode.MixedStep,
    cases.ManageCase: manage_cases.Management,
    cases.PrefixSiteCase: prefix_sites.PrefixAttention,
    cases.PrefixPromptCase: prefix_models.Prompt,
    cases.PrefixModelCase: prefix_models.PrefixModel,
    cases.PrefixDecodeCase: prefix_decode.PrefixStep,
    cases.QuantWeightCase: quant_sites.Dequantizing,
    cases.QuantSiteCase: quant_sites.QuantLayer,
    cases.QuantModelCase: quant_models.QuantModel,
    cases.GenerateCase: generate_models.LoraGeneration,
}
