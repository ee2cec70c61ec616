"""A model of each kernel's traffic: for each argument the elements that must move, and how many are asked for in all.

Functions of sizes and tiles, as the launch has them. Elements that must move: what the kernel's header promises. Asked
for in all: what its tiles read again, which comes from the caches. What is None at a launch does not count.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor
from traffic import COUNTED, Launch

Elements = dict[str, tuple[int, int]]  # name: elements that must move, elements asked for


def times(elements: int, reads: int) -> tuple[int, int]:
    """All of them ``reads`` times."""
    return elements, elements * reads


def cdiv(n: int, block: int) -> int:
    return -(-n // block)


def padded(rank: int) -> int:
    return cdiv(rank, 8) * 8


def of(launch: Launch, names: str) -> list[Any]:
    return [launch[name] for name in names.split()]


# ---------------------------------------------------------------------------------------------------- LoRA


def lora_shrink_model(t: Launch) -> tuple[Elements, Elements]:
    """x once per block of ranks, a once per tile of rows."""
    M, K, R = of(t, "M K R")
    tiles_m, splits, blocks_r = t.grid
    loads = dict(x=times(M * K, blocks_r), a=times(R * K, tiles_m), seed=times(1, tiles_m * splits * blocks_r))
    return loads, dict(out=times(splits * M * R, 1), bits=times(M * cdiv(K, 8), 1))


def sum_planes_model(t: Launch) -> tuple[Elements, Elements]:
    P, rows, cols = of(t, "P rows cols")
    return dict(planes=times(P * rows * cols, 1)), dict(out=times(rows * cols, 1))


def lora_gemm_model(t: Launch) -> tuple[Elements, Elements]:
    """What has rows once per tile of columns, what has columns once per tile of rows; y is not read. Of planes, all."""
    M, N, K, R, P, BLOCK_M, BLOCK_N = of(t, "M N K R P BLOCK_M BLOCK_N")
    tiles_m, tiles_n = cdiv(M, BLOCK_M), cdiv(N, BLOCK_N)
    loads = dict(
        x=times(M * K, tiles_n), s=times(P * M * R, tiles_n), w=times(N * K, tiles_m), b=times(N * R, tiles_m),
        bias=times(N, tiles_m), bits=times(M * cdiv(N, 8), 1),
    )  # fmt: skip
    return loads, dict(y=times(M * N, 1), s_out=times(M * R, 1))


def lora_expand_model(t: Launch) -> tuple[Elements, Elements]:
    M, N, R = of(t, "M N R")
    tiles_m, tiles_n = t.grid
    loads = dict(
        s=times(M * R, tiles_n), b=times(N * R, tiles_m), base=times(M * N, 1), bits=times(M * cdiv(N, 8), 1)
    )  # fmt: skip
    in_place = t["base"] is not None and t["base"].data_ptr() == t["y"].data_ptr()
    return loads, {"base" if in_place else "y": times(M * N, 1)}


def lora_grad_model(t: Launch) -> tuple[Elements, Elements]:
    """t once per block of ranks, v once per block of columns; b stays in registers over a chunk of rows."""
    M, C, R = of(t, "M C R")
    blocks_c, chunks, blocks_r = t.grid
    loads = dict(
        t=times(M * C, blocks_r), v=times(M * R, blocks_c), b=times(C * R, chunks),
        bits=times(M * cdiv(C, 8), blocks_r),
    )  # fmt: skip
    return loads, dict(g=times(chunks * C * R, 1), ds=times(blocks_c * M * R, 1))


def lora_one_launch_model(t: Launch) -> tuple[Elements, Elements]:
    """As lora_gemm, and a once per program."""
    M, N, K, R = of(t, "M N K R")
    tiles_n, tiles_m = t.grid
    loads = dict(
        x=times(M * K, tiles_n), w=times(N * K, tiles_m), a=times(R * K, tiles_n * tiles_m), b=times(N * R, tiles_m),
        bias=times(N, tiles_m), seed=times(1, tiles_n * tiles_m),
    )  # fmt: skip
    return loads, dict(y=times(M * N, 1), s=times(M * R, 1), bits=times(M * cdiv(K, 8), 1))


# ------------------------------------------------------------------------------------------- mixed batches


class Jobs:
    """The parts of a plan's blocks that have rows, one program each: slot, rank and number of rows."""

    def __init__(self, t: Launch, part_rows: int, parts: int):
        ranks = t["ranks"].tolist()
        rows = [
            (slot, ranks[slot], min(count - part * part_rows, part_rows))
            for slot, _, count in t["blocks"].tolist()
            for part in range(parts)
            if count > part * part_rows
        ]
        self.all = len(rows)
        self.all_rows = sum(n for _, _, n in rows)
        self.live = [job for job in rows if job[1] > 0]
        self.slots = {slot for slot, _, _ in rows}
        self.ranks = {slot: rank for slot, rank, _ in self.live}
        self.rows = sum(n for _, _, n in self.live)
        self.row_ranks = sum(n * rank for _, rank, n in self.live)
        self.row_padded = sum(n * padded(rank) for _, rank, n in self.live)

    def a(self, K: int) -> tuple[int, int]:
        return sum(self.ranks.values()) * K, sum(rank for _, rank, _ in self.live) * K

    def b(self, N: int) -> tuple[int, int]:
        return sum(map(padded, self.ranks.values())) * N, sum(padded(rank) for _, rank, _ in self.live) * N

    def x(self, K: int, BLOCK_R: int) -> int:
        """Ranks beyond BLOCK_R take another pass over the rows."""
        return sum(n * cdiv(rank, BLOCK_R) for _, rank, n in self.live) * K


def block_tables(t: Launch, jobs: Jobs, parts: int, others: int) -> Elements:
    """What programs read to know their rows and adapter, all at once; others: programs per part of a block."""
    by_slot = (len(jobs.slots), jobs.all * others)
    return dict(
        blocks=times(3 * t["blocks"].shape[0], parts * others), order=times(jobs.all_rows, others),
        ranks=by_slot, addresses=by_slot,
    )  # fmt: skip


def mixed_plan_model(t: Launch) -> tuple[Elements, Elements]:
    """slots once for the program's rows and once for those they are compared with; the sorted slots three times."""
    M, blocks = t["M"], t["n_blocks"]
    sorted_rows = 3 * M - 1 - (M == t["BLOCK"])  # with those before, of one more where there is room, and those after
    return dict(slots=times(M, 2), order=(M, sorted_rows), known=(M, sorted_rows)), dict(
        known=times(M, 1), order=times(M, 1), blocks=times(3 * blocks, 1), counters=times(t["n_counters"], 1)
    )


def mixed_shrink_model(t: Launch) -> tuple[Elements, Elements]:
    K, BLOCK_M, BLOCK_R, PARTS = of(t, "K BLOCK_M BLOCK_R PARTS")
    jobs, splits = Jobs(t, BLOCK_M, PARTS), t.grid[1]
    loads = block_tables(t, jobs, PARTS, splits) | dict(x=(jobs.rows * K, jobs.x(K, BLOCK_R)), A=jobs.a(K))
    return loads, dict(planes=times(splits * jobs.row_ranks, 1))


def mixed_expand_model(t: Launch) -> tuple[Elements, Elements]:
    """B's rows with what fills them up to 8 ranks, and as many columns of the planes."""
    P, N, BLOCK_M, PARTS = of(t, "P N BLOCK_M PARTS")
    jobs, tiles_n = Jobs(t, BLOCK_M, PARTS), t.grid[1]
    loads = block_tables(t, jobs, PARTS, tiles_n) | dict(
        scales=(len(jobs.slots), jobs.all * tiles_n), planes=times(P * jobs.row_padded, tiles_n), B=jobs.b(N),
        y=times(jobs.rows * N, 1),
    )  # fmt: skip
    return loads, dict(y=times(jobs.rows * N, 1))


def mixed_embedding_model(t: Launch) -> tuple[Elements, Elements]:
    jobs = Jobs(t, t["BLOCK_M"], t["PARTS"])
    ids, order, ranks, V = t["ids"].tolist(), t["order"].tolist(), t["ranks"].tolist(), t["V"]
    read = [
        (slot, ids[row])
        for slot, first, count in t["blocks"].tolist()
        for row in order[first : first + count]
        if 0 <= ids[row] < V
    ]
    asked, once = (sum(ranks[slot] for slot, _ in which) for which in (read, set(read)))
    loads = block_tables(t, jobs, t["PARTS"], 1) | dict(ids=times(jobs.rows, 1), A=(once, asked))
    return loads, dict(planes=times(jobs.row_ranks, 1))


def mixed_gemm_model(t: Launch) -> tuple[Elements, Elements]:
    """As lora_gemm; B once per tile of rows for each adapter in it."""
    M, N, K, P, BLOCK_M, BLOCK_N = of(t, "M N K P BLOCK_M BLOCK_N")
    tiles_m, tiles_n = cdiv(M, BLOCK_M), cdiv(N, BLOCK_N)
    slots, ranks = t["slots"][t["order"].long()].tolist(), t["ranks"].tolist()
    tiles = [{slot for slot in slots[i : i + BLOCK_M] if slot >= 0} for i in range(0, M, BLOCK_M)]
    used = set().union(*tiles)
    live, products = {slot for slot in used if ranks[slot]}, [slot for tile in tiles for slot in tile]
    adapters = [slot for slot in products if ranks[slot]]
    scratch = P * sum(padded(ranks[slot]) for slot in slots if slot >= 0)
    by_slot = (len(used), len(products) * tiles_n)
    loads = dict(
        order=times(M, tiles_n), slots=times(M, tiles_n), x=times(M * K, tiles_n), w=times(N * K, tiles_m),
        bias=times(N, tiles_m), planes=times(scratch, tiles_n), ranks=by_slot, scales=by_slot, addresses=by_slot,
        B=(sum(padded(ranks[slot]) for slot in live) * N, sum(padded(ranks[slot]) for slot in adapters) * N),
    )  # fmt: skip
    return loads, dict(y=times(M * N, 1))


def one_launch(t: Launch, programs: int, tiles: int) -> tuple[Elements, Elements, int]:
    """x once per tile and once more for s; every tile waits for, and reads, all planes. Third: the number of jobs."""
    M, N, K, SPLIT, BLOCK_R, BLOCK_J = of(t, "M N K SPLIT BLOCK_R BLOCK_J")
    jobs, entries = Jobs(t, BLOCK_J, 1), t["blocks"].shape[0]
    loads = dict(
        blocks=(entries + 2 * jobs.all, entries * programs + 3 * jobs.all * (SPLIT + tiles)),
        ranks=(len(jobs.slots), jobs.all * (SPLIT + tiles)),
        order=(M, jobs.all_rows * SPLIT + M * tiles),
        addresses=(2 * len(jobs.slots), jobs.all * (SPLIT + tiles)),
        scales=(len(jobs.slots), jobs.all * tiles),
        x=(M * K, M * K * tiles + jobs.x(K, BLOCK_R)), A=jobs.a(K), w=times(N * K, 1), bias=times(N, 1),
        planes=times(SPLIT * jobs.row_padded, tiles), B=jobs.b(N),
    )  # fmt: skip
    stores = dict(planes=times(SPLIT * jobs.row_ranks, 1), y=times(M * N, 1), counters=times(4, 1))
    return loads, stores, jobs.all * SPLIT


def mixed_one_launch_model(t: Launch) -> tuple[Elements, Elements, Elements]:
    """A ticket of each program and its end, a count of each job; each tile waits once, where jobs are done."""
    programs, tiles = t.grid[0], cdiv(t["N"], t["BLOCK_N"])
    loads, stores, jobs = one_launch(t, programs, tiles)
    return loads, stores, dict(counters=(3, 2 * programs + jobs + tiles))


# ------------------------------------------------------------------------------------------- quantized


def nibbles(packed: Tensor, with_zero: bool) -> int:
    """How many of the 16 codes are looked up; masked lanes look up the first one."""
    found = {byte >> 4 for byte in packed.tolist()} | {byte & 15 for byte in packed.tolist()}
    return len(found | ({0} if with_zero else set()))


def factors(t: Launch, blocks: int, asked: int, lanes: int, loads: int) -> Elements:
    """What an absmax takes: ``asked`` of them, in ``loads`` loads of ``lanes`` lanes; nested ones have a second table.

    Masked lanes look up the table's first entry.
    """
    if t["code2"] is None:
        return dict(absmax=(blocks, asked))
    looked_up = set(t["absmax"].tolist()) | ({0} if lanes * loads > asked else set())
    return dict(
        absmax=(blocks, asked), absmax2=(cdiv(blocks, t["NESTED_BLOCKSIZE"]), asked), offset=times(1, loads),
        code2=(len(looked_up), lanes * loads),
    )  # fmt: skip


def fourbit_model(t: Launch) -> tuple[Elements, Elements]:
    n, n_bytes, BLOCKSIZE, BLOCK_E = of(t, "n_elements n_bytes BLOCKSIZE BLOCK_E")
    span, programs = min(BLOCKSIZE, BLOCK_E), t.grid[0]
    loads = dict(packed=times(n_bytes, 1), code=(nibbles(t["packed"], programs * BLOCK_E > n), programs * BLOCK_E))
    return loads | factors(t, cdiv(n, BLOCKSIZE), cdiv(n, span), BLOCK_E // span, programs), dict(w=times(n, 1))


def fourbit_weight(t: Launch, tiles_n: int, tiles_m: int) -> Elements:
    """A weight (N, K) once per tile of rows of x, a step over one block at a time."""
    N, K, BLOCKSIZE, BLOCK_N, BLOCK_K = of(t, "N K BLOCKSIZE BLOCK_N BLOCK_K")
    steps = K // BLOCK_K
    looked_up = nibbles(t["packed"], N % BLOCK_N > 0)
    loads = dict(
        packed=times(N * K // 2, tiles_m), code=(looked_up, tiles_n * BLOCK_N * K * tiles_m)
    )  # fmt: skip
    return loads | factors(t, N * K // BLOCKSIZE, N * steps * tiles_m, BLOCK_N, steps * tiles_n * tiles_m)


def fourbit_linear_model(t: Launch) -> tuple[Elements, Elements]:
    M, N, K, R = of(t, "M N K R")
    tiles_n, tiles_m = t.grid
    loads = dict(
        x=times(M * K, tiles_n), a=times(R * K, tiles_n * tiles_m), b=times(N * R, tiles_m), bias=times(N, tiles_m)
    )
    return loads | fourbit_weight(t, tiles_n, tiles_m), dict(y=times(M * N, 1))


def fourbit_mixed_model(t: Launch) -> tuple[Elements, Elements, Elements]:
    """Every program makes a tile, and jobs before it: a ticket and a count per job, a last ticket, a wait, its end."""
    programs = t.grid[0]
    loads, stores, jobs = one_launch(t, programs, programs)
    del loads["w"]
    return loads | fourbit_weight(t, programs, 1), stores, dict(counters=(3, 2 * jobs + 3 * programs))


def fourbit_decode_model(t: Launch) -> tuple[Elements, Elements]:
    """A weight once, each step's absmax one step ahead; s beside it, and all planes are written."""
    M, N, K, R, BLOCKSIZE, GROUP, BLOCK_N, BLOCK_R = of(t, "M N K R BLOCKSIZE GROUP BLOCK_N BLOCK_R")
    tiles_n, P = cdiv(N, BLOCK_N), t.grid[1]
    columns = cdiv(K, BLOCKSIZE * GROUP) * BLOCKSIZE * GROUP  # those of all steps
    blocks = N * K // BLOCKSIZE
    loads = dict(
        x=times(M * K, tiles_n + cdiv(R, BLOCK_R)), a=times(R * K, 1), packed=times(N * K // 2, 1),
        code=(nibbles(t["packed"], columns > K or N % BLOCK_N > 0), tiles_n * BLOCK_N * columns),
    )  # fmt: skip
    factor = factors(t, blocks, blocks, BLOCK_N * GROUP, tiles_n * columns // (BLOCKSIZE * GROUP))
    if "offset" in factor:
        factor["offset"] = times(1, tiles_n * P)
    return loads | factor, dict(planes=times(P * M * N, 1), s=times(P * M * R, 1))


def fourbit_finish_model(t: Launch) -> tuple[Elements, Elements]:
    M, N, R, P, BLOCK_N = of(t, "M N R P BLOCK_N")
    loads = dict(planes=times(P * M * N, 1), s=times(P * M * R, cdiv(N, BLOCK_N)), b=times(N * R, 1), bias=times(N, 1))
    return loads, dict(y=times(M * N, 1))


def int8_quantize_model(t: Launch) -> tuple[Elements, Elements]:
    """x once per block of ranks, and once more by the first block, for q."""
    M, K, R = of(t, "M K R")
    tiles_m, blocks_r = t.grid
    loads = dict(x=times(M * K, blocks_r + 1), a=times(R * K, tiles_m))
    return loads, dict(q=times(M * K, 1), absmax=times(M, 1), s=times(M * R, 1))


def int8_quantize_rows_model(t: Launch) -> tuple[Elements, Elements]:
    """x once for q and once per block of ranks for s, whose planes are all written."""
    M, K, R, BLOCK_M, BLOCK_R, SPLIT = of(t, "M K R BLOCK_M BLOCK_R SPLIT")
    loads = dict(x=times(M * K, cdiv(R, BLOCK_R) + 1), a=times(R * K, cdiv(M, BLOCK_M)))
    return loads, dict(q=times(M * K, 1), absmax=times(M, 1), planes=times(SPLIT * M * R, 1))


def int8_gemm_model(t: Launch) -> tuple[Elements, Elements]:
    M, N, K, R, P, BLOCK_M, BLOCK_N = of(t, "M N K R P BLOCK_M BLOCK_N")
    tiles_m, tiles_n = cdiv(M, BLOCK_M), cdiv(N, BLOCK_N)
    loads = dict(
        q=times(M * K, tiles_n), absmax=times(M, tiles_n), planes=times(P * M * R, tiles_n), w=times(N * K, tiles_m),
        w_absmax=times(N, tiles_m), b=times(N * R, tiles_m), bias=times(N, tiles_m),
    )  # fmt: skip
    return loads, dict(y=times(M * N, 1))


# ------------------------------------------------------------------------------------- prefix attention


def sizes_of(t: Launch) -> tuple[int, ...]:
    """B, H, KV, L, S, D."""
    (B, H, L, D), (_, KV, S, _) = t["q"].shape, t["k"].shape
    return B, H, KV, L, S, D


def prefixes_of(t: Launch, B: int) -> list[tuple[int, int]]:
    """Start and length of each row."""
    if t["starts"] is None:
        return [(0, t["max_length"])] * B
    return list(zip(t["starts"].tolist(), t["lengths"].tolist(), strict=True))


def keys_of(t: Launch, first: int, last: int, low: int, high: int) -> range:
    """Of the keys first .. last those in reach of queries low .. high, from a multiple of BLOCK_N on."""
    if t["CAUSAL"]:
        last = min(last, high + t["causal_offset"] + 1)
        if t["WINDOWED"]:
            first = max(first, low + t["causal_offset"] - t["window"] + 1)
    return range(first // t["BLOCK_N"] * t["BLOCK_N"], last)


def past_of(t: Launch) -> int:
    return 0 if t["past"] is None else t["past"].item()


def mask_rows(t: Launch, block: str) -> int:
    """How many rows of a mask a tile reads: one where it is the same for all queries and heads."""
    rows: int = 1 if t["PADDING"] else t[block]
    return rows


def whole_keys(t: Launch, reach: range, begin: int) -> int:
    """How many of the keys in reach of queries from begin on the forward takes without a look at the mask."""
    if t["CAUSAL"] and t["WINDOWED"]:
        return 0
    last = min(reach.stop, begin + t["causal_offset"] + 1) if t["CAUSAL"] else reach.stop
    whole: int = max(last - reach.start, 0) // t["BLOCK_N"] * t["BLOCK_N"]
    return whole


def rows_model(t: Launch, per_row: str, skips: bool) -> tuple[Elements, Any]:
    """prefix_fwd and prefix_dq: per tile of BLOCK_M queries the row's prefix and the keys in reach.

    Queries beyond the last repeat it. Whole tiles of keys are read to their end. A mask is read twice, to find what it
    shows and for the scores; here it hides nothing, and what skips then reads it once but for the last keys.
    """
    (B, H, KV, L, S, D), (BLOCK_M, BLOCK_N) = sizes_of(t), of(t, "BLOCK_M BLOCK_N")
    tiles, asked = t.grid[0], Counter[str]()
    keys, slots = set(), set()
    for b, (start, length) in enumerate(prefixes_of(t, B)):
        for begin in range(0, L, BLOCK_M):
            first = max(0, length + past_of(t) + begin - t["window"] + 1) if t["WINDOWED"] else 0
            mine = range(first // BLOCK_N * BLOCK_N, length)
            reach = keys_of(t, 0, S, begin, min(begin + BLOCK_M, L) - 1)
            read = range(reach.start, min(S, reach.start + cdiv(len(reach), BLOCK_N) * BLOCK_N))
            masked = len(reach) + len(read) - (whole_keys(t, reach, begin) if skips else 0)
            asked += Counter(slots=len(mine), keys=len(read), mask=mask_rows(t, "BLOCK_M") * masked)
            keys |= {(b, key) for key in read}
            slots |= {start + slot for slot in mine}
    programs = tiles * H * B
    k, pk = (len(keys) * KV * D, asked["keys"] * H * D), (len(slots) * KV * D, asked["slots"] * H * D)
    loads = {name: (B * H * L * D, programs * BLOCK_M * D) for name in per_row.split()}
    loads |= dict(
        k=k, v=k, pk=pk, pv=pk, starts=times(B, tiles * H), lengths=times(B, tiles * H), past=times(1, programs),
        seed=times(1, programs), mask=(0 if t["mask"] is None else t["mask"].numel(), asked["mask"] * H),
        bias=(0 if t["bias"] is None else t["bias"].numel(), asked["slots"] * H * BLOCK_M),
    )  # fmt: skip
    return loads, programs


def prefix_fwd_model(t: Launch) -> tuple[Elements, Elements]:
    (B, H, _, L, _, D), (loads, programs) = sizes_of(t), rows_model(t, "q", skips=True)
    loads |= dict(sinks=(H, programs))
    return loads, dict(out=times(B * H * L * D, 1), lse=times(B * H * L, 1))


def prefix_dq_model(t: Launch) -> tuple[Elements, Elements]:
    (B, H, _, L, _, D), (loads, programs) = sizes_of(t), rows_model(t, "q dout", skips=False)
    loads |= dict(sums=(2 * B * H * L, 2 * programs * t["BLOCK_M"]))
    return loads, dict(dq=times(B * H * L * D, 1))


def prefix_delta_model(t: Launch) -> tuple[Elements, Elements]:
    rows, D = of(t, "rows D")
    return dict(dout=times(rows * D, 1), out=times(rows * D, 1), lse=times(rows, 1)), dict(sums=times(2 * rows, 1))


def prefix_dkv_model(t: Launch) -> tuple[Elements, Elements]:
    """q and dout of the queries that see a tile of keys, once per tile; a mask for all heads is looked at once more.

    Padding is read once, a number for each key.
    """
    (B, H, KV, L, S, D), (BLOCK_M, BLOCK_N, group) = sizes_of(t), of(t, "BLOCK_M BLOCK_N group")
    asked, seen = Counter[str](), set()
    for begin in range(0, S, BLOCK_N):
        first, last = 0, L
        if t["CAUSAL"]:
            first = max(0, begin - t["causal_offset"]) // BLOCK_M * BLOCK_M
            if t["WINDOWED"]:
                last = min(last, begin + BLOCK_N - 1 + t["window"] - t["causal_offset"])
        tiles = cdiv(max(last - first, 0), BLOCK_M)
        queries = range(first, min(first + tiles * BLOCK_M, L))
        seen |= set(queries)
        scan = BLOCK_N * max(last - first, 0)
        masked = BLOCK_N if t["PADDING"] else scan + group * tiles * BLOCK_M * min(BLOCK_N, S - begin)
        asked += Counter(jobs=tiles, lse=len(queries), mask=masked)
    own, jobs = times(B * KV * S * D, 1), asked["jobs"] * B * H
    q, sums = (len(seen) * B * H * D, jobs * BLOCK_M * D), jobs * BLOCK_M + asked["lse"] * B * H
    loads = dict(
        k=own, v=own, q=q, dout=q, sums=(2 * B * H * len(seen), sums), seed=times(1, jobs),
        mask=(0 if t["mask"] is None else t["mask"].numel(), asked["mask"] * B * KV),
    )  # fmt: skip
    return loads, dict(dk=own, dv=own)


def prefix_dprefix_model(t: Launch) -> tuple[Elements, Elements]:
    """q and dout of every row whose prefix meets a tile of slots, once per tile; k and v of the prefix once a share."""
    (B, H, L, D), (T, KV, _) = t["q"].shape, t["pk"].shape
    BLOCK_M, BLOCK_N = of(t, "BLOCK_M BLOCK_N")
    tiles_t, _, shares = t.grid
    queries, met, meetings, slots = cdiv(L, BLOCK_M) * BLOCK_M, set(), 0, 0
    for b, (start, length) in enumerate(prefixes_of(t, B)):
        overlaps = [min(start + length, at + BLOCK_N) - max(start, at) for at in range(0, T, BLOCK_N)]
        overlaps = [overlap for overlap in overlaps if length and overlap > 0]
        meetings, slots = meetings + len(overlaps), slots + sum(overlaps)
        met |= {b} if overlaps else set()
    own, programs = T * KV * D, tiles_t * KV * shares
    q = len(met) * H * L * D, meetings * H * queries * D
    loads = dict(
        pk=times(own, shares), pv=times(own, shares), q=q, dout=q,
        sums=(2 * len(met) * H * L, meetings * H * (queries + L)), starts=times(B, programs),
        lengths=times(B, programs), past=times(1, programs), seed=times(1, meetings * H * queries // BLOCK_M),
        bias=(0 if t["bias"] is None else t["bias"].numel(), slots * H * queries),
    )  # fmt: skip
    return loads, dict(dpk=times(shares * own, 1), dpv=times(shares * own, 1))


def prefix_decode_model(t: Launch) -> tuple[Elements, Elements]:
    """Keys once per tile of a row's queries, each prefix once per tile of queries of several rows."""
    (B, H, KV, L, S, D), (BLOCK_M, group) = sizes_of(t), of(t, "BLOCK_M group")
    queries, programs, splits = group * L, t.grid[0] * t.grid[1], t["prefix_splits"]
    order = range(B) if t["order"] is None else t["order"].tolist()
    rows, asked, keys, slots, shared = prefixes_of(t, B), Counter[str](), set(), set(), 0
    for begin in range(0, B * queries if splits else 0, BLOCK_M):
        longest: dict[int, int] = {}
        for at in range(begin, min(begin + BLOCK_M, B * queries)):
            start, length = rows[order[at // queries]]
            longest[start] = max(longest.get(start, 0), length)
        shared += splits * KV
        for start, length in longest.items():
            asked["slots"] += length
            asked["tiles"] += sum(
                1 for part in range(splits) if length > part * t["slots_per_split"]
            )  # fmt: skip
            slots |= {start + slot for slot in range(length)}
    for part in range(t["splits"]):
        first = part * t["keys_per_split"]
        reach = keys_of(t, first, min(first + t["keys_per_split"], S), 0, L - 1)
        asked["keys"] += len(reach)
        keys |= set(reach)
    tiles = B * cdiv(queries, BLOCK_M)
    k = len(keys) * B * KV * D, asked["keys"] * tiles * KV * D
    pk = len(slots) * KV * D, asked["slots"] * KV * D
    parts = splits + t["splits"]
    loads = dict(
        q=(B * H * L * D, programs * BLOCK_M * D), order=(B, programs * BLOCK_M), k=k, v=k, pk=pk, pv=pk,
        starts=(B, shared * BLOCK_M), lengths=(B, shared * BLOCK_M), past=times(1, shared), seed=times(1, programs),
        mask=(0 if t["mask"] is None else t["mask"].numel(), 2 * mask_rows(t, "BLOCK_M") * asked["keys"] * tiles * KV),
    )  # fmt: skip
    return loads, dict(parts=times(parts * B * H * L * D, 1), sums=times(parts * B * H * L, 1))


def prefix_merge_model(t: Launch) -> tuple[Elements, Elements]:
    PARTS, D, H = of(t, "PARTS D H")
    rows, columns = t.grid
    loads = dict(parts=times(PARTS * rows * D, 1), sums=times(PARTS * rows, columns), sinks=(H, rows * columns))
    return loads, dict(out=times(rows * D, 1), lse=times(rows, 1))


MODELS: dict[str, Callable[[Launch], tuple[Elements, ...]]] = {
    name.removesuffix("_model"): model for name, model in list(globals().items()) if name.endswith("_model")
}  # fmt: skip
del MODELS["rows"]


def check(launches: list[Launch]) -> list[str]:
    """Compare each launch with its model and return the kernels' names in order."""
    for launch in launches if COUNTED else ():
        for kind, expected in zip(("loaded", "stored", "atomic"), (*MODELS[launch.kernel](launch), {}), strict=False):
            present = {name: n for name, n in expected.items() if launch.arguments.get(name, 0) is not None and n[1]}
            once = {name: n * launch.itemsize[name] for name, (n, _) in present.items()}
            asked = {name: n * launch.itemsize[name] for name, (_, n) in present.items()}
            assert getattr(launch, f"unique_{kind}") == once, f"{launch.kernel}: {kind} at least once"
            assert getattr(launch, kind) == asked, f"{launch.kernel}: {kind} in all"
    return [launch.kernel for launch in launches]
