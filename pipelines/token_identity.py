"""Does a position still stand for its token? How well tokens are read off the activations of every layer.

id(L) is the share of test positions whose token is found again in h_L: a linear map to the token embedding, fitted by
ridge on train documents, and the nearest token (by cosine with the centred embedding, among the token types of the
sampled text). The same is done for the previous and the next token. Where id(L) is low, what a feature of that layer
does at a position says nothing about the token that stands there (arXiv 2601.22928 shows how explanations of tokens
fail where it is not asked).

All layers are read in one pass. Of train rows only sums are kept, [d, d] and [d, d_embedding] a layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from saeql.sae.config import check_least
from saeql.sae.hook_points import KINDS, layer_stack, resolve
from saeql.sae.metrics import Bootstrap, DocumentGroups, Estimate, ratio
from saeql.store.evidence import Evidence
from saeql.store.records import SPLITS

from .forward import ForwardPass
from .models import LanguageModel, ModelError
from .output_labels import centred_embedding
from .progress import OnProgress
from .token_classes import pad_lists

#: Which token of a row is looked for, by its distance.
TARGETS = {"own": 0, "previous": -1, "next": 1}
#: Ridge penalties tried on calibration documents, as shares of the activations' mean variance.
PENALTIES = (1e-4, 1e-2, 1.0)
#: Norm above which a row is left out, in medians of the first batch: as in the harvest.
MASSIVE = 10.0


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """Token identifiability by depth, and the masked-token test: on how much text and how many features."""

    train_tokens: int = 20_000
    """Train tokens that the linear maps are fitted on."""
    calibration_tokens: int = 512
    """Calibration tokens that choose the ridge penalty."""
    test_tokens: int = 3_072
    """Test tokens that identity is measured on."""
    min_identity: float = 0.9
    """id of the layer from which a single token may be named; more can be asked, less cannot."""
    min_delta: float = 0.5
    """Share of the activation that replacing the own token must cost where id is lower; never less than this."""
    features: int = 96
    """Features whose tokens are masked, evenly spread over those asked for; 0: none."""
    rows: int = 4
    """Strongest test rows of each."""
    replacements: int = 2
    """Random tokens that a token is replaced by, one after the other; the mean activation counts."""
    batch_tokens: int = 4096
    """Tokens of one forward pass."""
    num_bootstrap: int = 1000
    """Draws of documents behind each interval."""
    seed: int = 0
    """Seed of sampled tokens and draws."""

    def __post_init__(self):
        check_least(
            self, "token_identity", train_tokens=1, calibration_tokens=1, test_tokens=1, features=0, rows=1,
            replacements=1, batch_tokens=1, num_bootstrap=1, min_identity=0.9, min_delta=0.5,
        )  # fmt: skip


@dataclass(frozen=True)
class PlaceIdentity:
    """What is found again at one hook point, by target."""

    hook_point: str
    layer: int | None  # None where it is in no layer
    found: dict[str, Estimate]  # 'own', 'previous', 'next': share of test rows

    @property
    def own(self) -> Estimate:
        """id(L)."""
        return self.found["own"]


@dataclass(frozen=True)
class TokenIdentity:
    """id at every hook point that was asked for."""

    model_name: str
    num_train_rows: int
    num_test_rows: int
    num_types: int  # token types among which the nearest is taken
    commonest: float  # share of test rows that the commonest token of train has: what knowing nothing gives
    places: list[PlaceIdentity] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class _Windows:
    """Sampled windows of one split: token ids and documents [W, T], -1 behind the end."""

    ids: np.ndarray
    documents: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """[W, T] bool: rows that count; both neighbours are there."""
        out = self.ids >= 0
        out[:, :1] = False
        out[:, :-1] &= self.ids[:, 1:] >= 0
        out[:, -1:] = False
        return out


def hook_points_of(lm: LanguageModel, layers: Sequence[int] | None = None) -> list[str]:
    """The residual stream in front of the first layer and behind every layer, or behind those named.

    Raises HookPointError for a model whose layers are not known, ModelError for a layer that it has not.
    """
    count = len(layer_stack(lm.model)[1])
    if layers is None:
        return ["resid_pre.0", *(f"resid_post.{n}" for n in range(count))]
    wrong = [n for n in layers if not 0 <= n < count]
    if wrong:
        raise ModelError(f"{lm.identity.model_name} has no layer {wrong[0]}: its layers are 0 to {count - 1}")
    return [f"resid_post.{n}" for n in layers]


def token_identity(
    lm: LanguageModel,
    evidence: Evidence,
    hook_points: Sequence[str],
    config: TokensConfig,
    on_progress: OnProgress | None = None,
) -> TokenIdentity:
    """id, and the same of both neighbours, at each of `hook_points`, of any width.

    Reads the evidence table `windows`. Raises HookPointError for a hook point that the model does not have, ModelError
    where the sampled text of a split has no row.
    """
    limits = (config.train_tokens, config.calibration_tokens, config.test_tokens)
    splits = {s: _sample(evidence, s, n) for s, n in zip(SPLITS, limits, strict=True)}
    for name, windows in splits.items():
        if not windows.rows.any():
            raise ModelError(f"{evidence.folder} has no {name} windows of three tokens to read tokens from")
    types, codes = _types(splits, lm)
    embedding = centred_embedding(lm)[types].to(lm.device)  # [C, e]
    fits = {name: _Fit(embedding) for name in dict.fromkeys(hook_points)}
    total = sum(w.ids.size for w in splits.values())
    done, meters = 0, {name: _Hits() for name in fits}
    batch = max(1, config.batch_tokens // max(w.ids.shape[1] for w in splits.values()))
    with ForwardPass(lm, list(fits)) as forward:
        for split, windows in splits.items():
            if split == "test":
                for fit in fits.values():
                    fit.settle()
            for start in range(0, len(windows.ids), batch):
                part = _Windows(windows.ids[start : start + batch], windows.documents[start : start + batch])
                rows = part.rows
                found = forward.run(np.maximum(part.ids, 0))
                for name, fit in fits.items():
                    keep = rows & fit.is_usual(found[name].norms, rows)
                    acts = _acts(found[name].values[keep], lm.device)
                    targets = {t: codes[np.roll(part.ids, -d, axis=1)[keep]] for t, d in TARGETS.items()}
                    if split == "train":
                        fit.add(acts, targets)
                    elif split == "calibration":
                        fit.calibrate(acts, targets)
                    else:
                        meters[name].add(fit.hits(acts, targets), part.documents[keep])
                done += part.ids.size
                if on_progress is not None:
                    on_progress(done, total)
    train, test = (splits[s].ids[splits[s].rows] for s in ("train", "test"))
    commonest = float((test == np.bincount(train).argmax()).mean())
    places = [PlaceIdentity(name, resolve(lm.model, name).layer, meters[name].estimates(config)) for name in fits]
    return TokenIdentity(lm.identity.model_name, len(train), len(test), len(types), commonest, places)


def _sample(evidence: Evidence, split: str, num_tokens: int) -> _Windows:
    """Windows evenly spread over a split, as many as hold `num_tokens`."""
    table = evidence.read("windows", columns=["split", "token_ids", "document_ids"], split=split)
    width = max(1, int(np.max(table["token_ids"].combine_chunks().value_lengths().to_numpy(), initial=1)))
    num = min(table.num_rows, -(-num_tokens // width))
    chosen = np.unique(np.linspace(0, max(table.num_rows - 1, 0), num).round().astype(int))
    table = table.take(chosen)
    return _Windows(pad_lists(table["token_ids"]), pad_lists(table["document_ids"]))


def _types(splits: dict[str, _Windows], lm: LanguageModel) -> tuple[torch.Tensor, np.ndarray]:
    """Token ids [C] that occur in any split, and the number of each among them by token id."""
    types = np.unique(np.concatenate([w.ids[w.ids >= 0] for w in splits.values()]))
    codes = np.full(int(types.max()) + 1, -1, np.int64)
    codes[types] = np.arange(len(types))
    return torch.from_numpy(types).long().to(lm.model.get_input_embeddings().weight.device), codes


def _acts(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """[n, d] float32."""
    acts = torch.from_numpy(values)
    return (acts.view(torch.bfloat16) if acts.dtype == torch.uint16 else acts).to(device).float()


class _Fit:
    """The linear maps of one hook point, from sums over train rows; one a target."""

    def __init__(self, embedding: torch.Tensor):
        self.embedding = embedding
        self.count = 0
        self.limit = 0.0  # norm
        self.sums: dict[str, torch.Tensor] = {}
        self.maps: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}  # by target: (weight [d, e], bias [e])
        self.calibration = {target: np.zeros(len(PENALTIES)) for target in TARGETS}

    def is_usual(self, norms: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """[B, T] bool: norms that are not massive, by the median of the first batch."""
        if self.limit == 0:
            self.limit = MASSIVE * float(np.median(norms[rows]))
        return norms <= self.limit

    def add(self, acts: torch.Tensor, targets: dict[str, np.ndarray]) -> None:
        """Train rows [n, d] with the number of their tokens among the types."""
        new = {"acts": acts.sum(0), "gram": acts.t() @ acts}
        for target, tokens in targets.items():
            wanted = self._rows(tokens)
            new[f"{target} mean"], new[target] = wanted.sum(0), acts.t() @ wanted
        self.sums = {key: self.sums[key] + value if self.sums else value for key, value in new.items()}
        self.count += len(acts)

    def _rows(self, tokens: np.ndarray) -> torch.Tensor:
        return self.embedding[torch.from_numpy(tokens).to(self.embedding.device)]

    def _solve(self) -> None:
        """Ridge with every penalty: centred, so that the bias is not shrunk."""
        sums = {key: value.double() / self.count for key, value in self.sums.items()}
        centre = sums["acts"]
        gram = sums["gram"] - centre[:, None] * centre
        unit = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * gram.diagonal().mean()
        wanted = {t: sums[t] - centre[:, None] * sums[f"{t} mean"] for t in TARGETS}
        right = torch.cat(list(wanted.values()), dim=1)
        self.maps = {target: [] for target in TARGETS}
        for penalty in PENALTIES:
            weights = torch.linalg.solve(gram + penalty * unit, right).split(self.embedding.shape[1], dim=1)
            for target, weight in zip(TARGETS, weights, strict=True):
                self.maps[target].append((weight.float(), (sums[f"{target} mean"] - centre @ weight).float()))
        self.sums = {}

    def calibrate(self, acts: torch.Tensor, targets: dict[str, np.ndarray]) -> None:
        """Count what every penalty finds on calibration rows."""
        if not self.maps:
            self._solve()
        for target, tokens in targets.items():
            for n, made in enumerate(self.maps[target]):
                self.calibration[target][n] += self._found(acts, tokens, made).sum()

    def settle(self) -> None:
        """Keep, for each target, the penalty that found most on calibration rows; of equals the largest."""
        for target, found in self.calibration.items():
            best = len(PENALTIES) - 1 - int(np.argmax(found[::-1]))
            self.maps[target] = [self.maps[target][best]]

    def hits(self, acts: torch.Tensor, targets: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """[n] bool by target: the nearest token is the right one."""
        return {target: self._found(acts, tokens, self.maps[target][0]) for target, tokens in targets.items()}

    def _found(self, acts: torch.Tensor, tokens: np.ndarray, made: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
        weight, bias = made
        nearest = ((acts @ weight + bias) @ self.embedding.t()).argmax(-1)  # of unit rows: by cosine
        return nearest.cpu().numpy() == tokens


class _Hits:
    """Hits and rows by document."""

    def __init__(self):
        self._groups, self._documents = DocumentGroups(), []
        self._hits: dict[str, list[np.ndarray]] = {target: [] for target in TARGETS}

    def add(self, hits: dict[str, np.ndarray], documents: np.ndarray) -> None:
        self._documents.append(self._groups.of(documents))
        for target, own in hits.items():
            self._hits[target].append(own)

    def estimates(self, config: TokensConfig) -> dict[str, Estimate]:
        """Share of hits by target, with its interval over documents."""
        size, groups = len(self._groups), np.concatenate(self._documents)
        bootstrap = Bootstrap(size, config.num_bootstrap, config.seed)
        rows = np.bincount(groups, minlength=size).astype(float)
        return {
            target: bootstrap.estimate(ratio(np.bincount(groups, np.concatenate(own), size), rows), len(groups))
            for target, own in self._hits.items()
        }


def residual_layers(identity: TokenIdentity) -> Iterator[tuple[float, PlaceIdentity]]:
    """Places in the residual stream by depth in layers passed, for a curve over layers."""
    for place in identity.places:
        kind = place.hook_point.partition(".")[0]
        if place.layer is not None and kind in KINDS and kind.startswith("resid"):
            yield place.layer + (kind == "resid_post"), place
