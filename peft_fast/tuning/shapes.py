"""What is to be measured: the sizes of a model's adapted layers."""

from dataclasses import dataclass

Site = tuple[int, int, int]  # N, K, R


@dataclass(frozen=True)
class Shapes:
    """tokens: numbers of rows, ascending powers of two, as launches count them.

    plain, four_bit, int8: (N, K, R) of adapted linear layers, by what their base's weight is.
    dropout: some of the adapters have it.
    head_sizes: of attention with a learned prefix, () where there is none.    heads: of queries, of keys and values.
    trained_from: the fewest rows that a training step has.
    """

    tokens: tuple[int, ...]
    plain: tuple[Site, ...] = ()
    four_bit: tuple[Site, ...] = ()
    int8: tuple[Site, ...] = ()
    dropout: bool = False
    head_sizes: tuple[int, ...] = ()
    heads: tuple[int, int] = (32, 8)
    trained_from: int = 256

    @property
    def trained(self) -> tuple[int, ...]:
        """The numbers of rows that a training step has."""
        return tuple(M for M in self.tokens if M >= self.trained_from)


def rank_bucket(R: int) -> int:
    """The power of two that kernels round a rank up to, at least 16."""
    return max(16, power_of_2(R))


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(0, n - 1).bit_length()


def _sites(*ranks: int) -> tuple[Site, ...]:
    """Of Llama-3-8B: q and o, k and v, gate and up, down."""
    return tuple((N, K, R) for N, K in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)) for R in ranks)


LLAMA_8B = Shapes(
    tokens=(1, 16, 64, 256, 1024, 2048, 8192),
    plain=_sites(16, 64), four_bit=_sites(16, 64), int8=_sites(16, 64), dropout=True, head_sizes=(128, 64),
)  # fmt: skip
# for a try in Triton's interpreter
TINY = Shapes(
    tokens=(1, 4), plain=((40, 48, 16),), four_bit=((64, 128, 16),), int8=((64, 128, 16),), dropout=True,
    head_sizes=(16,), heads=(4, 2), trained_from=4,
)  # fmt: skip
