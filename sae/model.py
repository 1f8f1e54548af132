"""A dictionary of features: weights, initialisation, and the forward pass that all architectures and forms share.

An architecture decides which latents are active (`sae/architectures/`); a form decides what is read and written:

- autoencoder: reads x and reconstructs it;
- transcoder: reads x and predicts y, another place of the model (arXiv 2406.11944); a skip transcoder adds `W_skip x`
  (arXiv 2501.18823);
- crosscoder: an autoencoder over the concatenation of several places, one latent space for all
  (Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing").

In memory both weights are feature-major, `W_enc` [d_sae, d_in] and `W_dec` [d_sae, d_out], because kernels read rows.
"""

import math
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import nn

from saeql.kernels.autograd import SparseLatents, sparse_decode, topk_encode
from saeql.kernels.entries import AnyEntries, Entries, above
from saeql.kernels.topk import PreActs

from .comm import ALONE, Comm
from .config import ConfigError, DictionaryConfig

#: Random numbers in memory at once while a dictionary starts.
_DRAWN_NUMBERS = 2**20
#: Rows whose distance to the geometric median is computed at once.
_MEDIAN_ROWS = 1024


class Outcome(NamedTuple):
    """What one training batch gave."""

    y_hat: torch.Tensor  # [N, d_out], with gradient
    reconstruction: torch.Tensor  # scalar with gradient: mean squared error per coordinate
    sparsity: torch.Tensor  # scalar with gradient: weighted penalty, 0 where the architecture has none
    fired: torch.Tensor  # [m] indices of latents that were active, repeats allowed
    num_active: torch.Tensor  # scalar: active latents, summed over rows


class EncodeOptions(TypedDict, total=False):
    """How `select` encodes, beside the rows; the keywords of `encode_topk`."""

    matmul_dtype: torch.dtype | None
    W_cast: torch.Tensor | None  # W_enc in that precision, if at hand
    wanted: PreActs | None  # takes some pre-activations along


class SparseAutoencoder(nn.Module):
    """Base of all architectures and forms: parameters, decode, folding. Subclasses define `encode` and `outcome`.

    Raises ConfigError where `d_out` does not fit the form.
    """

    architecture: str = ""
    #: Tensors with a row for every latent; ranks that train one dictionary together may hold some of them each.
    by_latent: frozenset[str] = frozenset({"W_enc", "b_enc", "W_dec"})
    #: Whether the loss of what `select` chooses is plain reconstruction: then `sparse_step.py` makes the gradients.
    selects: bool = False
    #: Weight of the sparsity penalty where the configuration leaves it open.
    default_sparsity_coefficient: float = 0.0
    #: Whether dead latents learn from the residual by the auxiliary loss of `sae/objective.py`.
    has_auxk: bool = True
    #: Norm of the encoder's rows at the start. Adam's steps do not grow with the weights, so short rows turn faster.
    encoder_start: float = 1.0
    #: Parameters [d_sae] that are 0 for a latent which is resampled.
    latent_biases: tuple[str, ...] = ("b_enc",)

    def __init__(self, config: DictionaryConfig, d_in: int, d_out: int | None = None):
        super().__init__()
        d_out = d_in if d_out is None else d_out
        self.config, self.d_in, self.d_out = config, d_in, d_out
        self.metadata: dict[str, Any] = {}
        self.comm: Comm = ALONE  # who else trains it: holds other latents of it, or sees other rows
        if self.reads_what_it_writes and d_in != d_out:
            raise ConfigError(
                f"dictionary.form {config.form} writes what it reads: d_out ({d_out}) must be d_in ({d_in})"
            )
        self.W_enc = nn.Parameter(torch.zeros(config.d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.W_dec = nn.Parameter(torch.zeros(config.d_sae, d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        if config.form == "skip_transcoder":
            self.W_skip = nn.Parameter(torch.zeros(d_out, d_in))
        else:
            self.register_parameter("W_skip", None)

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.config.d_sae

    @property
    def sparsity_coefficient(self) -> float:
        """Weight of the sparsity penalty: the configured one, else the architecture's own."""
        configured = self.config.sparsity_coefficient
        return self.default_sparsity_coefficient if configured is None else configured

    @property
    def reads_what_it_writes(self) -> bool:
        """Whether the encoder takes `b_dec` off its input: autoencoders and crosscoders do, transcoders cannot."""
        return self.config.form in ("autoencoder", "crosscoder")

    @property
    def encoder_b_dec(self) -> torch.Tensor | None:
        """`b_dec` where the encoder takes it off its input."""
        return self.b_dec if self.reads_what_it_writes else None

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Random unit decoder rows, and an encoder that starts as their transpose (arXiv 2406.04093, appendix A.1), its
        rows `encoder_start` long.

        A transcoder's encoder starts from random rows of its own. Ranks that hold the latents together start them as
        one process would.
        """
        generator = torch.Generator().manual_seed(seed)
        total = self.d_sae * self.comm.feature_size
        first = self.comm.shard(total).start
        _draw_unit_rows(self.W_dec, first, total, generator)
        if self.reads_what_it_writes:
            self.W_enc.copy_(self.W_dec)
        else:
            _draw_unit_rows(self.W_enc, first, total, generator)
        self.W_enc.mul_(self.encoder_start)
        self.start_sparse()

    def start_sparse(self) -> None:
        """Set biases or thresholds so that few latents are active at the start; called by `initialise`."""

    @property
    def initial_threshold(self) -> float:
        """What a projection on a random row must exceed at the start: the configured value, else `once_threshold`."""
        configured = self.config.initial_threshold
        return once_threshold(self.d_sae / self.d_in) if configured is None else configured

    # --- the forward pass ----------------------------------------------------------------------------------------

    def encode(self, x: torch.Tensor, *, matmul_dtype: torch.dtype | None = None) -> SparseLatents:
        """Sparse latents of rows x [N, d_in] as they are at inference; values are >= 0, padding has value 0."""
        raise NotImplementedError

    def slope(self, latents: torch.Tensor) -> torch.Tensor:
        """[...] how much these latents (indices [...]) rise with their projection `W_enc x` while active."""
        return torch.ones_like(latents, dtype=self.W_enc.dtype)

    def outcome(self, x: torch.Tensor, y: torch.Tensor, *, matmul_dtype: torch.dtype | None = None) -> Outcome:
        """Training forward pass on rows x [N, d_in] with targets y [N, d_out]."""
        raise NotImplementedError

    def select(self, centred: torch.Tensor, **options: Unpack[EncodeOptions]) -> SparseLatents:
        """Latents of a training batch, without gradient, of rows [N, d_in] with any encoder bias taken off.

        Only where `selects`.
        """
        raise NotImplementedError

    def decode(self, latents: SparseLatents, x: torch.Tensor | None = None) -> torch.Tensor:
        """Reconstruction [N, d_out]; a skip transcoder also needs its input x [N, d_in]."""
        return self.with_skip(sparse_decode(latents, self.W_dec, self.b_dec), x)

    def with_skip(self, y_hat: torch.Tensor, x: torch.Tensor | None, *, frozen: bool = False) -> torch.Tensor:
        """`y_hat + W_skip x` for a skip transcoder, y_hat for every other form; `frozen` gives W_skip no gradient."""
        if self.W_skip is None:
            return y_hat
        if x is None:
            raise ValueError("x: a skip transcoder decodes with its input")
        return y_hat + x @ (self.W_skip.detach() if frozen else self.W_skip).t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Reconstruction, or prediction, [N, d_out] of rows x [N, d_in]."""
        return self.decode(self.encode(x), x)

    def above(
        self,
        x: torch.Tensor,
        limit: torch.Tensor | float,
        *,
        matmul_dtype: torch.dtype | None = None,
        whole: bool = False,
    ) -> AnyEntries:
        """The pre-activations of rows x [N, d_in] that exceed `limit`, by the cheaper route: see `kernels.entries`."""
        b_dec = self.encoder_b_dec
        return above(x, self.W_enc, self.b_enc, limit, b_dec=b_dec, matmul_dtype=matmul_dtype, whole=whole)

    def encode_subset(self, x: torch.Tensor, latents: torch.Tensor, k: int) -> SparseLatents:
        """The k largest among `latents` (indices [m]) only; indices count within the subset. For auxiliary losses."""
        return topk_encode(x, self.W_enc[latents], self.b_enc[latents], k, b_dec=self.encoder_b_dec)

    def sparse_outcome(self, latents: SparseLatents, x: torch.Tensor, y: torch.Tensor) -> Outcome:
        """Outcome of latents that are sparse already and carry no penalty."""
        y_hat = self.decode(latents, x)
        active = latents.values.detach() > 0
        none = torch.zeros((), device=x.device)
        return Outcome(y_hat, (y - y_hat).square().mean(), none, latents.indices[active], active.sum())

    def penalised_outcome(
        self, found: AnyEntries, z: torch.Tensor, sparsity: torch.Tensor, x: torch.Tensor, y: torch.Tensor
    ) -> Outcome:
        """Outcome of latents z, the values of `found`, with their penalty."""
        y_hat = self.with_skip(found.decode(z, self.W_dec, self.b_dec), x)
        active = z.detach() > 0
        fired = found.indices[active] if isinstance(found, Entries) else active.any(0).nonzero()[:, 0]
        return Outcome(y_hat, (y - y_hat).square().mean(), sparsity, fired, active.count_nonzero())

    # --- between training and use --------------------------------------------------------------------------------

    @torch.no_grad()
    def fold_scaling(
        self, x_mean: torch.Tensor, x_scale: torch.Tensor, y_mean: torch.Tensor, y_scale: torch.Tensor
    ) -> None:
        """Turn a dictionary of `(x - x_mean) * x_scale -> (y - y_mean) * y_scale` into one of x -> y.

        Means and scales are [d_in] and [d_out]. Latents come out divided by the geometric mean c of `y_scale`: with one
        scale for all coordinates the decoder rows keep their unit norm, and which latents are active does not change.
        """
        is_one = bool((y_scale == y_scale[0]).all())
        c = float(y_scale[0] if is_one else y_scale.log().mean().exp())
        shift = torch.zeros_like(self.b_enc)
        if not self.reads_what_it_writes:
            shift = self.W_enc @ (x_mean * x_scale)
            self.b_enc.sub_(shift)
        self.W_enc.mul_(x_scale / c)
        self.b_enc.div_(c)
        self.W_dec.mul_(torch.full_like(y_scale, c).div_(y_scale))  # exactly 1 for one scale: rows keep their bits
        self.b_dec.div_(y_scale).add_(y_mean)
        if self.W_skip is not None:
            self.W_skip.mul_(x_scale).div_(y_scale[:, None])
            self.b_dec.sub_(self.W_skip @ x_mean)
        self.fold_extra(c, shift)

    def fold_extra(self, c: float, shift: torch.Tensor) -> None:
        """Fold what an architecture has beside the common weights: latents are divided by c, and the encoder's
        projection `W_enc x` has lost `shift` [d_sae] (before the division) to the biases.
        """

    def extra_tensors(self) -> dict[str, torch.Tensor]:
        """Tensors of the architecture beside the common ones, under the names of the file format."""
        return {}

    def load_extra(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what `extra_tensors` gave."""


def _draw_unit_rows(out: torch.Tensor, first: int, total: int, generator: torch.Generator) -> None:
    """Fill `out` [n, d] with rows `first` to `first + n - 1` of `total` random unit rows; the others are drawn too, a
    block at a time, and dropped.

    The generator gives numbers in sixteens, so that blocks of 16 rows give those of one draw of all rows.
    """
    width = out.shape[1]
    block_rows = max(16, _DRAWN_NUMBERS // width // 16 * 16)
    for start in range(0, total, block_rows):
        drawn = torch.randn(min(block_rows, total - start), width, generator=generator)
        low, high = max(start, first), min(start + len(drawn), first + len(out))
        if low < high:
            own = drawn[low - start : high - start]
            out[low - first : high - first] = own / own.norm(dim=1, keepdim=True)


def once_threshold(expansion: float, *, least: float = 1.5) -> float:
    """The threshold t at which random unit rows, `expansion` times as many as coordinates, give a row back once.

    A projection p on such a row is normal with the variance of a coordinate, here 1; rows with p > t, read and written,
    add up to `expansion * E[p^2; p > t]` times the row. 2.0 for 8 times as many rows: 2.2 % of them are then active.
    Never below `least`, where 7 % are: a threshold that starts low is learnt as its logarithm, and takes long to rise.
    """

    def kept(t: float) -> float:
        return t * math.exp(-t * t / 2) / math.sqrt(2 * math.pi) + math.erfc(t / math.sqrt(2)) / 2

    low, high = 0.0, 10.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if expansion * kept(middle) > 1 else (low, middle)
    return max(high, least)


@torch.no_grad()
def geometric_median(rows: torch.Tensor, *, num_steps: int = 50, tolerance: float = 1e-6) -> torch.Tensor:
    """Point [d] with the least sum of distances to rows [N, d] (Weiszfeld's iteration)."""
    point = rows.mean(0)
    for _ in range(num_steps):
        distances = [(block - point).norm(dim=1) for block in rows.split(_MEDIAN_ROWS)]  # no copy of all rows
        weights = 1 / torch.cat(distances).clamp_min(1e-8)
        new = (weights @ rows) / weights.sum()
        moved = float((new - point).norm())
        point = new
        if moved <= tolerance * math.sqrt(rows.shape[1]):
            break
    return point
