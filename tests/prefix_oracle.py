"""Attention with a prefix by concatenation, inputs for every feature of it, and the comparison of both."""

import torch
from torch import Tensor
from torch.nn import functional as F

from numerics import assert_as_accurate
from peft_fast.ops.functional import prefix_attention
from peft_fast.reference import lora as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["out", "lse", "dq", "dk", "dv", "dprefix_k", "dprefix_v"]
SHAPE = dict(B=4, Hq=4, Hkv=2, L=6, S=6, D=32, T=9)
# rows 0 and 2 share a prefix, row 1 has none, row 3 uses a part of the first one
STARTS, LENGTHS, MAX_LENGTH = [0, 5, 0, 1], [5, 0, 5, 3], 5


# ---- the oracle: what PEFT does


def expanded(prefix: Tensor, k: Tensor, starts, lengths, max_length) -> Tensor:
    """A prefix (T, H, D) for every row of the batch, (B, H, max_length, D)."""
    if starts is None:
        return prefix.transpose(0, 1).expand(k.shape[0], -1, -1, -1)
    slots = starts.long()[:, None] + torch.arange(max_length, device=k.device)
    return prefix[slots.clamp(max=prefix.shape[0] - 1)].transpose(1, 2)


def hidden_keys(q, k, C, lengths, mask, past, causal_offset, window) -> Tensor:
    """True where a query does not see a key, (B, 1 or Hq, L, C + S)."""
    B, _, L, _ = q.shape
    S, device = k.shape[2], q.device
    i, c, j = (torch.arange(n, device=device) for n in (L, C, S))
    length = torch.full((B,), C, device=device) if lengths is None else lengths.long()
    length = length[:, None, None, None]
    slots = (c >= length).expand(B, 1, L, C)
    if window is not None:
        slots = slots | (length + (0 if past is None else past) + i[:, None] - c >= window)
    own = torch.zeros(B, 1, L, S, dtype=torch.bool, device=device)
    if causal_offset is not None:
        age = i[:, None] + causal_offset - j
        own = own | (age < 0) | (age >= (1 << 30 if window is None else window))
    if mask is not None:
        own = own | (~mask if mask.dtype == torch.bool else mask <= -1e30)
    return torch.cat([slots.expand(B, own.shape[1], L, C), own], -1)


def concatenated(
    q, k, v, prefix_k, prefix_v, *, starts=None, lengths=None, order=None, max_length=None, mask=None,
    prefix_bias=None, sinks=None, past=None, scale=None, causal_offset=None, window=None, softcap=0.0,
    dropout_p=0.0, seed=None,
):  # fmt: skip
    """The formula in q's dtype: expand, repeat, concatenate, softmax. Returns out (B, L, Hq, D) and lse."""
    (B, H, L, D), S = q.shape, k.shape[2]
    C = prefix_k.shape[0] if max_length is None else max_length
    keys, values = (
        torch.cat([expanded(p, t, starts, lengths, C), t], 2).repeat_interleave(H // k.shape[1], 1)
        for p, t in ((prefix_k, k), (prefix_v, v))
    )
    hidden = hidden_keys(q, k, C, lengths, mask, past, causal_offset, window)
    scores = q @ keys.transpose(2, 3) * (D**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    bias = torch.zeros(B, H, L, C + S, dtype=q.dtype, device=q.device)
    if prefix_bias is not None:
        bias[..., :C] += prefix_bias.to(q.dtype)
    if mask is not None and mask.dtype != torch.bool:
        bias[..., C:] += mask.to(q.dtype)
    scores = (scores + bias).masked_fill(hidden, -1e4 if q.dtype == torch.float16 else -1e30)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(q.dtype).view(1, H, 1, 1).expand(B, H, L, 1)], -1)
    p = torch.softmax(scores, -1)[..., : C + S].masked_fill(hidden, 0.0)
    lse = scores.float().logsumexp(-1) if q.dtype != torch.float64 else scores.logsumexp(-1)
    if sinks is None:
        lse = lse.masked_fill(hidden.all(-1), float("-inf"))
    if dropout_p > 0:
        bits = reference.dropout_bits(seed.cpu(), B * H * L, C + S, dropout_p).to(q.device)
        keep = (bits[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=q.device)).flatten(1)[:, : C + S] & 1
        p = p * keep.view(p.shape) / (1 - dropout_p)
    return (p @ values).transpose(1, 2), lse


def sdpa(q, k, v, prefix_k, prefix_v, *, starts=None, lengths=None, max_length=None, mask=None, prefix_bias=None,
         past=None, scale=None, causal_offset=None, window=None):  # fmt: skip
    """Plain torch's attention over the concatenation, for what it knows; the budget of errors comes from it."""
    (B, H, L, _), S = q.shape, k.shape[2]
    C = prefix_k.shape[0] if max_length is None else max_length
    keys, values = (
        torch.cat([expanded(p, t, starts, lengths, C), t], 2).repeat_interleave(H // k.shape[1], 1)
        for p, t in ((prefix_k, k), (prefix_v, v))
    )
    hidden = hidden_keys(q, k, C, lengths, mask, past, causal_offset, window)
    bias = torch.zeros(B, H, L, C + S, dtype=q.dtype, device=q.device)
    if prefix_bias is not None:
        bias[..., :C] += prefix_bias.to(q.dtype)
    if mask is not None and mask.dtype != torch.bool:
        bias[..., C:] += mask.to(q.dtype)
    blind = hidden.all(-1, keepdim=True)
    bias = bias.masked_fill(hidden & ~blind, float("-inf"))
    out = F.scaled_dot_product_attention(q, keys, values, bias, scale=scale)
    return out.masked_fill(blind, 0.0).transpose(1, 2)


# ---- inputs


def draw(dtype, device="cpu", *, B, Hq, Hkv, L, S, D, T) -> list[Tensor]:
    """q, k, v, prefix_k, prefix_v, laid out as a model has them: heads inside rows, the prefix one layer of a table."""
    q, k, v = (
        torch.randn(B, n, h, D, device=device, dtype=dtype).transpose(1, 2) for n, h in ((L, Hq), (S, Hkv), (S, Hkv))
    )
    table = torch.randn(T, 3, 2, Hkv, D, device=device, dtype=dtype)
    return [q, k, v, table[:, 1, 0], table[:, 1, 1]]


def rows(device="cpu"):
    starts, lengths = (torch.tensor(t, dtype=torch.int32, device=device) for t in (STARTS, LENGTHS))
    return dict(starts=starts, lengths=lengths, max_length=MAX_LENGTH)


def padding(B, S, device="cpu"):
    """Left padding: of row 0 nothing, of the last row everything is hidden."""
    hidden = torch.arange(B, device=device) * S // max(B - 1, 1)
    return (torch.arange(S, device=device) >= hidden[:, None])[:, None, None]


def additive(B, Hq, L, S, device="cpu"):
    mask = torch.randn(B, Hq, L, S, device=device)
    mask[:, :, :, :1] = float("-inf")
    mask[0, -1, L // 2] = float("-inf")
    return mask


def features(shape, device="cpu"):
    """name: (option of the call); each is exclusive within its list."""
    B, Hq, L, S = (shape[n] for n in ("B", "Hq", "L", "S"))

    def biases(C):
        return dict(prefix_bias=torch.randn(1, Hq, L, C, device=device))

    return {
        "all": {}, "rows": rows(device),
        "bidirectional": {}, "causal": dict(causal_offset=S - L),
        "window": dict(causal_offset=S - L, window=4, past=torch.tensor([S - L], device=device)),
        "bool": dict(mask=padding(B, S, device) & torch.ones(L, S, device=device).tril(S - L).bool()),
        "padding+causal": dict(mask=padding(B, S, device), causal_offset=S - L),
        "padding+window": dict(
            mask=padding(B, S, device), causal_offset=S - L, window=5, past=torch.tensor([S - L], device=device)
        ),
        "additive": dict(mask=additive(B, Hq, L, S, device)),
        "mask+window": dict(mask=padding(B, S, device), window=7, past=torch.tensor([2], device=device)),
        "nothing": {}, "bias": biases,
        "plain": {}, "softcap": dict(softcap=1.5), "sinks": dict(sinks=torch.randn(Hq, device=device)),
        "dropout": dict(dropout_p=0.3, seed=torch.tensor([1234567890123], device=device)),
        "sinks+softcap+scale": dict(sinks=torch.randn(Hq, device=device), softcap=2.0, scale=0.3),
    }  # fmt: skip


def options_of(names, shape, device="cpu"):
    table = features(shape, device)
    options = {}
    for name in names:
        chosen = table[name]
        if callable(chosen):
            chosen = chosen(options.get("max_length", shape["T"]))
        options |= chosen
    return options


def run(fn, tensors, dout, **options):
    """[out, lse, dq, dk, dv, dprefix_k, dprefix_v]."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    result = fn(*leaves, **options)
    out, lse = result if isinstance(result, tuple) else (result, None)
    gradients = torch.autograd.grad(out, leaves, dout.to(out.dtype))
    return [out.detach(), None if lse is None else lse.detach(), *gradients]


def in_double(options):
    wide = ("mask", "prefix_bias", "sinks")
    return {n: t.double() if n in wide and t.dtype != torch.bool else t for n, t in options.items()}


def check_exact(shape, options, device="cpu"):
    """In fp64 nothing but rounding separates the op from the oracle."""
    tensors = draw(torch.float64, device, **shape)
    dout = torch.randn(shape["B"], shape["L"], shape["Hq"], shape["D"], device=device, dtype=torch.float64)
    got, want = (run(fn, tensors, dout, **in_double(options)) for fn in (prefix_attention, concatenated))
    for name, g, w in zip(NAMES, got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
    return got


def check_accuracy(shape, options, dtype, device="cpu", baseline=sdpa, draws=8, factor=2.0):
    """Several draws together: with few values, plain torch may be lucky."""
    got, same, exact = [], [], []
    for _ in range(draws):
        tensors = draw(dtype, device, **shape)
        dout = torch.randn(shape["B"], shape["L"], shape["Hq"], shape["D"], device=device, dtype=dtype)
        got.append(run(prefix_attention, tensors, dout, **options))
        same.append(run(baseline, tensors, dout, **options))
        exact.append(run(concatenated, [t.double() for t in tensors], dout.double(), **in_double(options)))
    for i, name in enumerate(NAMES):
        g, e = (torch.stack([r[i] for r in rs]) for rs in (got, exact))
        if name == "lse":
            seen = e.isfinite()
            assert torch.equal(g.isfinite(), seen)
            close = 1e-5 if dtype == torch.float32 else 2e-3 if dtype == torch.float16 else 2e-2
            torch.testing.assert_close(g[seen].double(), e[seen], rtol=close, atol=close)
            continue
        assert g.dtype == dtype, name
        assert_as_accurate(name, g, torch.stack([r[i] for r in same]), e, factor)
