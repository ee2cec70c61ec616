"""PeftModel for each task: the arguments of its forward, and the head that an adapter trains as well."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import PeftModel

__all__ = [
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
]


class _PeftModelWithHead(PeftModel):
    """A task with a new head, which every adapter trains and saves."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the base model. input_ids, attention_mask: (B, T). inputs_embeds: (B, T, D). Raises: as
        `PeftModel.forward`."""
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=self._returns_dict(return_dict),
            **self._with_tasks(task_ids, kwargs),
        )


class PeftModelForSequenceClassification(_PeftModelWithHead):
    """PeftModel for sequence classification; the modules "classifier" and "score" are trained and saved as well."""

    _task = "SEQ_CLS"
    _head_names = ("classifier", "score")


class PeftModelForTokenClassification(_PeftModelWithHead):
    """PeftModel for token classification; the modules "classifier" and "score" are trained and saved as well."""

    _task = "TOKEN_CLS"
    _head_names = ("classifier", "score")


class PeftModelForQuestionAnswering(PeftModel):
    """PeftModel for extractive question answering; the module "qa_outputs" is trained and saved as well."""

    _task = "QUESTION_ANS"
    _head_names = ("qa_outputs",)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the base model. start_positions, end_positions: (B,). token_type_ids and position_ids reach the base model
        (PEFT 0.21.2 drops them). Raises: as `PeftModel.forward`."""
        given = {"token_type_ids": token_type_ids, "position_ids": position_ids}
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            start_positions=start_positions,
            end_positions=end_positions,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=self._returns_dict(return_dict),
            **{key: value for key, value in given.items() if value is not None},
            **self._with_tasks(task_ids, kwargs),
        )


class PeftModelForCausalLM(PeftModel):
    """PeftModel for causal language modelling."""

    _task = "CAUSAL_LM"
    _pipeline_tag = "text-generation"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the base model. input_ids, attention_mask, labels: (B, T). Raises: as `PeftModel.forward`."""
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            **self._with_tasks(task_ids, kwargs),
        )


class PeftModelForSeq2SeqLM(PeftModel):
    """PeftModel for sequence-to-sequence language modelling."""

    _task = "SEQ_2_SEQ_LM"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the base model. input_ids: (B, T) of the encoder; decoder_*, labels: (B, S). Raises: as
        `PeftModel.forward`."""
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_inputs_embeds=decoder_inputs_embeds,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            **self._with_tasks(task_ids, kwargs),
        )


class PeftModelForFeatureExtraction(PeftModel):
    """PeftModel for hidden states as features or embeddings."""

    _task = "FEATURE_EXTRACTION"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the base model. input_ids, attention_mask: (B, T). Raises: as `PeftModel.forward`."""
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            **self._with_tasks(task_ids, kwargs),
        )
