"""What the API takes and gives, as OpenAPI describes it. Keys of features are Neuronpedia's where it has them."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_ID = 2**31 - 1


class Strict(BaseModel):
    """A body: a key that is not known is refused rather than ignored."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Problem(BaseModel):
    """Why a request was not answered as asked."""

    error: str


class DictionaryOut(BaseModel):
    """A row of the view `dictionaries`."""

    dictionary: str
    architecture: str | None
    model_name: str | None
    hook_point: str | None
    d_in: int | None
    d_sae: int
    k: int | None
    fvu: float | None
    l0: float | None
    dead_share: float | None
    ce_increase: float | None
    ce_recovered: float | None


class MetricOut(BaseModel):
    """A metric with its 95 % interval over documents."""

    metric: str
    split: str
    value: float | None
    n: int | None
    low: float | None
    high: float | None


class Hit(BaseModel):
    """A feature of a list; `score` is comparable within one search only."""

    dictionary: str
    feature: int
    label: str
    kind: str
    auroc: float | None
    density: float | None
    score: float
    matched: dict[str, list[str]]


class Features(BaseModel):
    """One page of a list."""

    total: int
    offset: int
    features: list[Hit]


class Activation(BaseModel):
    """An example. `binMin`, `binMax` and `binContains` are -1 for the strongest ones, as in Neuronpedia's export."""

    tokens: list[str]
    values: list[float]
    maxValue: float
    maxValueTokenIndex: int
    minValue: float
    binMin: float
    binMax: float
    binContains: float
    qualifyingTokenIndex: int
    decile: int | None = Field(description="10 is the strongest tenth; null for the strongest examples.")
    documentId: int
    title: str | None


class Explanation(BaseModel):
    """A label that passed, with its score on test documents."""

    description: str
    typeName: str
    scores: dict[str, float | None]


class ReceiptOut(BaseModel):
    """One check that the label had to pass."""

    control: str
    verdict: str
    text: str


class FeatureOut(BaseModel):
    """One feature, with Neuronpedia's keys; `saeql` is its row of the view `features`."""

    modelId: str
    layer: str
    index: str
    hookName: str
    maxActApprox: float
    frac_nonzero: float
    pos_str: list[str]
    pos_values: list[float]
    neg_str: list[str]
    neg_values: list[float]
    freq_hist_data_bar_values: list[float]
    freq_hist_data_bar_heights: list[int]
    topkCosSimIndices: list[int]
    topkCosSimValues: list[float]
    correlated_features_indices: list[int]
    correlated_features_pmi: list[float]
    explanations: list[Explanation]
    activations: list[Activation]
    receipts: list[ReceiptOut]
    saeql: dict[str, Any]


class SqlIn(Strict):
    """One reading statement over the views."""

    query: str
    max_rows: int = Field(1000, ge=1, description="Rows at most.")


class SqlOut(BaseModel):
    """Rows of a statement; `truncated` where there are more."""

    columns: list[str]
    rows: list[list[Any]]
    truncated: bool


class PromptIn(Strict):
    """A text to read."""

    text: str = Field(min_length=1)
    limit: int = Field(20, ge=1, le=200)


class PromptOut(BaseModel):
    """What fires on a text: `values` has, for each feature in `features`, one activation a token."""

    tokens: list[str]
    features: list[Hit]
    values: list[list[float]]


class EditIn(Strict):
    """A change of one feature; modes and units as `saeql steer` has them."""

    feature: int = Field(ge=0, le=MAX_ID)
    strength: float | None = None
    mode: Literal["add", "clamp", "scale", "ablate", "ablate_mean", "replace", "cap", "ablate_direction"] = "add"
    unit: Literal["norm", "p99", "raw"] = "norm"
    to: float | None = None


class DoseIn(Strict):
    """Edits whose strengths are varied together."""

    prompt: str = Field(min_length=1)
    edits: list[EditIn] = Field(min_length=1)


class SteerIn(DoseIn):
    """A prompt to continue with and without edits."""

    new_tokens: int = Field(40, ge=1)
    temperature: float = Field(0.0, ge=0, le=5)
    seed: int = Field(0, ge=0, le=MAX_ID)


class DoseOut(BaseModel):
    """What one multiple of the strengths does to the prediction after the prompt."""

    factor: float
    kl: float
    promoted: float | None
    likeliest: str
