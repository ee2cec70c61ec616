"""`MixedBatches`: the part of `LoraModel` that lets a call name an adapter for each of its rows."""

from __future__ import annotations

import threading
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...routing.bank import AdapterBank
from ...routing.batch import MixedBatch, check_names, current, number_of_rows, sequence_lengths, use, wrong_length
from ...utils.other import as_names
from .._adapters import tuner_layers
from .base import LoraLayer, check_not_merged

_SEQUENCES = ("cu_seq_lens_q", "cu_seqlens")
_CREATING = threading.Lock()


class MixedBatches(nn.Module):
    """Mixed batches of a tuner with `model` and `peft_config`."""

    model: Any
    peft_config: Any

    # ------------------------------------------------------------------------------------------------------ the bank
    @property
    def adapter_bank(self) -> AdapterBank:
        """The bank of this model's adapters, made at the first use; copies of the model get one of their own."""
        bank: AdapterBank | None = self.__dict__.get("_bank")
        if bank is None:
            if torch.compiler.is_compiling():
                raise RuntimeError("Call adapter_slots(...) before compiling: adapter_ids are ids that it hands out")
            with _CREATING:
                bank = self.__dict__.setdefault("_bank", AdapterBank(self))
        return bank

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_bank"}

    def mixed_layers(self) -> list[LoraLayer]:
        """The layers that the bank has tables for."""
        return tuner_layers(self.model, LoraLayer)

    def _create_layers(self, *args: Any) -> list[str]:
        names: list[str] = super()._create_layers(*args)  # type: ignore[misc]
        if "_bank" in self.__dict__:
            self.adapter_bank.scan()
        return names

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """What `.to()` and its kin do, on every module from the root down."""
        result = super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if "_bank" in self.__dict__:
            self.adapter_bank.look_at_all()
            self.adapter_bank.follow()
        return result

    def _load_from_state_dict(self, *args: Any) -> None:
        """What `load_state_dict` does, on every module from the root down."""
        if "_bank" in self.__dict__:
            self.adapter_bank.look_at_all()
        super()._load_from_state_dict(*args)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As every tuner; see `BaseTuner.set_adapter`."""
        if "_bank" in self.__dict__:
            for name in as_names(adapter_name):
                self.adapter_bank.bring_home(name)
        super().set_adapter(adapter_name, inference_mode)  # type: ignore[misc]
        if "_bank" in self.__dict__:
            self.adapter_bank.look_at_all()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """As every tuner; see `BaseTuner.set_requires_grad`."""
        super().set_requires_grad(adapter_names, requires_grad)  # type: ignore[misc]
        if "_bank" in self.__dict__:
            self.adapter_bank.look_at_all()

    def _leaving(self, adapter_name: str) -> AbstractContextManager[None]:
        return self.adapter_bank.leave(adapter_name) if "_bank" in self.__dict__ else nullcontext()

    def adapter_slots(self, names: Sequence[str]) -> Tensor:
        """Slot ids of adapters, for `adapter_ids` of a call: (len(names),) int32 on the model's device, -1 for
        "__base__".

        An id stays its adapter's own until `release_slots`: the adapter can be neither deleted nor evicted. Several
        calls may hand out the same id, each to be released.
        Raises: ValueError for unknown names; RuntimeError if there are not enough slots.
        """
        ids = self.adapter_bank.hand_out(list(names))
        return torch.tensor(ids, dtype=torch.int32, device=next(self.model.parameters()).device)

    def release_slots(self, ids: Tensor | Iterable[int]) -> None:
        """Give back slot ids from `adapter_slots`. On a GPU this waits for the device.

        Raises: ValueError for an id that is not handed out.
        """
        self.adapter_bank.take_back(ids.tolist() if isinstance(ids, Tensor) else ids)

    # ------------------------------------------------------------------------------------------------------- a call
    @contextmanager
    def mixed_batch(
        self,
        adapter_names: Sequence[str] | None = None,
        adapter_ids: Tensor | None = None,
        packed: bool = False,
        beside: Container[str] = (),
    ) -> Iterator[None]:
        """Let what this thread runs of the base model inside the `with` take an adapter for each row.

        `PeftModel.forward` and `generate` enter it themselves when they are given these arguments; engines that call
        the base model enter it explicitly. A model's call without these arguments inside the `with` takes them too.

        Args:
            adapter_names: one per row, "__base__" for none. Or:
            adapter_ids: (rows,) int32 from `adapter_slots`, -1 for none. Nothing depends on its values but the result,
                so one compiled or captured graph serves all of them.
            packed: they are for each token of a batch of one row, which holds several sequences.
            beside: names of adapters of another method, whose rows these layers leave alone.
        Raises: ValueError for unknown names, in training mode, or while adapters are merged; TypeError for names that
            are no list.
        """
        if adapter_names is not None and adapter_ids is not None:
            raise ValueError("Pass adapter_names or adapter_ids, not both")
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        bank = self.adapter_bank
        if adapter_ids is not None:
            _check_ids(adapter_ids)
            if not torch.compiler.is_compiling():
                check_not_merged(bank.layers)
                if adapter_ids.is_cuda and not torch.cuda.is_current_stream_capturing():
                    bank.check_handed_out()
            with use(MixedBatch(slots=adapter_ids, bank=bank, packed=packed)):
                yield
            return
        check_names(adapter_names)
        with bank.using(name for name in adapter_names if name not in beside):  # type: ignore[union-attr]
            check_not_merged(bank.layers)
            with use(MixedBatch(names=adapter_names, bank=bank, packed=packed, beside=beside)):
                yield

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, beside: Container[str] = (), **kwargs: Any) -> Iterator[None]:
        """Enter what a call's arguments say.

        Raises: as `mixed_batch`; ValueError where the number of names is not that of the rows, or of the sequences
            packed into one row.
        """
        if kwargs.get("alora_offsets") is not None:
            raise ValueError("alora_offsets is not supported by peft_fast yet; activate one adapter with set_adapter")
        names, ids = kwargs.get("adapter_names"), kwargs.get("adapter_ids")
        if names is None and ids is None:
            batch = current()
            # neither another model's batch is ours, nor that of a call which this one is inside of
            bank = self.__dict__.get("_bank")
            entered = batch is not None and bank is not None and batch.bank is bank and not batch.of_one_call
            with nullcontext() if batch is None or entered else use(None):
                yield
            return
        packed, rows = False, number_of_rows(args, kwargs)
        if names is not None:
            check_names(names)
            if rows is not None and len(names) != rows:
                names, packed = _names_of_tokens(names, rows, kwargs), True
        if ids is not None:
            _check_ids(ids)
            if rows is not None and ids.shape[0] != rows:
                ids, packed = _ids_of_tokens(ids, rows, kwargs), True
        with self.mixed_batch(names, ids, packed, beside):
            current().of_one_call = True  # type: ignore[union-attr]
            yield


def _check_ids(ids: Tensor) -> None:
    if not isinstance(ids, Tensor) or ids.ndim != 1 or ids.dtype not in (torch.int32, torch.int64):
        found = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids)
        raise TypeError(f"adapter_ids must be an int32 tensor (rows,) of slot ids from adapter_slots, got {found}")


def _names_of_tokens(names: Sequence[str], rows: int, kwargs: dict[str, Any]) -> list[str]:
    """A name for each token of one row that holds as many packed sequences as there are names."""
    ends = next((kwargs[key] for key in _SEQUENCES if kwargs.get(key) is not None), None)
    if rows != 1 or (ends is None and kwargs.get("position_ids") is None):
        raise wrong_length(len(names), rows)
    lengths = ends.diff().tolist() if ends is not None else sequence_lengths(kwargs["position_ids"])
    if len(lengths) != len(names):
        raise ValueError(f"One row of {len(lengths)} packed sequences needs a name for each, got {len(names)}")
    return [name for name, length in zip(names, lengths, strict=True) for _ in range(length)]


def _ids_of_tokens(ids: Tensor, rows: int, kwargs: dict[str, Any]) -> Tensor:
    """The same on the device; tokens of a sequence that has no id get none."""
    ends = next((kwargs[key] for key in _SEQUENCES if kwargs.get(key) is not None), None)
    positions = kwargs.get("position_ids")
    if rows != 1 or (ends is None and positions is None):
        raise wrong_length(ids.shape[0], rows)
    if ends is not None:
        tokens = next(v for v in (kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if v is not None).shape[1]
        sequence = torch.searchsorted(ends, torch.arange(tokens, device=ends.device, dtype=ends.dtype), right=True) - 1
    else:
        flat = positions.reshape(-1)  # type: ignore[union-attr]
        sequence = torch.cat([flat.new_zeros(1), flat.diff().ne(1).to(flat.dtype)]).cumsum(0)
    known = (sequence >= 0) & (sequence < ids.shape[0])
    return torch.where(known, ids[sequence.clamp(0, ids.shape[0] - 1)], torch.full_like(sequence, -1, dtype=ids.dtype))
