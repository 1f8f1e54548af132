"""Watching: every token that a steerer's model reads or writes is held against a guard's thresholds.

log      events are noted, nothing else happens
stop     the token that fired is the last one
clamp    from the token that fired on, the feature's activation is `to` times its p99 (default -0.5: pushed away)
ablate   from there on, the feature's activation is 0

Hooks are there for the length of the block and no longer. Values are those before any change that the guard makes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from saeql.sae.hooks import edit as edit_activations

from ..steering.edits import Edit
from ..steering.positions import Place, followed
from .guard import Guard, GuardError, window_means

if TYPE_CHECKING:
    from ..steering.steerer import Steerer

ACTIONS = ("log", "stop", "clamp", "ablate")
#: Goal of clamp, in multiples of the feature's p99.
CLAMP_TO = -0.5


@dataclass(frozen=True)
class Event:
    """A feature above its threshold at one token."""

    feature: int
    label: str
    token: str
    position: int
    """In the text; 0 is the BOS."""
    value: float
    threshold: float
    generated: bool
    """Whether the model wrote the token; False: it is of the prompt."""
    text: int
    """Number of the text in its batch."""


OnEvent = Callable[[Event], object]


class GuardFired(Exception):
    """A guard stopped the model; `event` says why."""

    def __init__(self, event: Event):
        super().__init__(f"feature {event.feature} ({event.label}) fired at {event.token!r}")
        self.event = event


@dataclass
class Watch:
    """What a guard saw. `events` are in order; `ids` [B, T] the tokens of the text at hand."""

    guard: Guard
    action: str
    on_event: OnEvent | None
    texts_of: Callable[[list[int]], list[str]]
    events: list[Event] = field(default_factory=list)
    ids: torch.Tensor | None = None
    since: dict[int, int] = field(default_factory=dict)
    """Feature -> position of its first event in the text at hand."""
    _last: torch.Tensor | None = None  # [B, window - 1, F] values before the tokens at hand

    def note_tokens(self, place: Place, given: torch.Tensor | None) -> None:
        """Before a forward pass that reads token ids [B, T]."""
        if place.past == 0:
            self.ids, self._last = None, None
            self.since.clear()
        if given is not None:
            given = given.detach().cpu()
            if self.action in ("stop", "clamp", "ablate") and len(given) > 1:
                raise GuardError(f"a guard that may {self.action} watches one text at a time, not a batch")
            self.ids = given if self.ids is None else torch.cat([self.ids, given], dim=1)

    def note_values(self, place: Place, values: torch.Tensor) -> None:
        """Activations [B, T, F] of the watched features, of a forward pass. Raises GuardFired."""
        num_rows, num_tokens, _ = values.shape
        padding = torch.zeros(num_rows, dtype=torch.long) if place.padding is None else place.padding
        index = torch.arange(place.past, place.past + num_tokens)[None] - padding[:, None]  # [B, T]
        values = values * (index > 0).to(values)[:, :, None]  # neither padding nor the BOS
        if self._last is None:
            self._last = values.new_zeros(num_rows, self.guard.window - 1, values.shape[2])
        with_last = torch.cat([self._last, values], dim=1)
        means = window_means(with_last, self.guard.window)
        self._last = with_last[:, num_tokens:]
        limits = torch.tensor([w.threshold for w in self.guard.features], device=means.device)
        fired = (means > limits) & (index > 0).to(means.device)[:, :, None]
        if not bool(fired.any()):
            return
        for row, token, number in sorted(fired.nonzero().tolist(), key=lambda at: (at[1], at[0], at[2])):
            self._note(row, int(index[row, token]), number, float(means[row, token, number]), place, token)

    def _note(self, row: int, position: int, number: int, value: float, place: Place, token: int) -> None:
        watched = self.guard.features[number]
        known = self.ids is not None and place.past + token < self.ids.shape[1]
        text = self.texts_of([int(self.ids[row, place.past + token])])[0] if known and self.ids is not None else ""
        generated = place.past + token >= place.prompt
        made = Event(watched.feature, watched.label, text, position, value, watched.threshold, generated, row)
        self.events.append(made)
        self.since.setdefault(watched.feature, position)
        if self.on_event is not None:
            self.on_event(made)
        if self.action == "stop":
            raise GuardFired(made)

    def share(self, feature: int, count: int) -> float:
        """How much of a feature's edit is made at position `count`: all of it from its first event on."""
        return float(feature in self.since and count >= self.since[feature])


@contextmanager
def watching(
    guard: Guard,
    steerer: "Steerer",
    action: str = "log",
    *,
    to: float | None = None,
    on_event: OnEvent | None = None,
) -> Iterator[Watch]:
    """Watch every forward pass of the steerer's model inside the block, and act as `action` says.

    With "stop" the forward pass that fires raises GuardFired, which leaves the block (`guarded` catches it). Values are
    read before edits of the steerer that are made inside the block. `on_event` is called with every event at once.
    Raises GuardError for an unknown action, for another model or dictionary than the guard's, and for a batch where the
    action changes the text; SteerError where the dictionary cannot change what it reads.
    """
    if action not in ACTIONS:
        raise GuardError(f"no action {action!r}: there is {', '.join(ACTIONS)}")
    if to is not None and action != "clamp":
        raise GuardError(f"action {action} has no goal: leave `to` out, or use clamp")
    guard.require(steerer.dictionary, steerer.lm.identity.model_sha256)
    watch = Watch(guard, action, on_event, steerer.lm.token_texts)
    with ExitStack() as stack:
        place = stack.enter_context(followed(steerer.lm.model))
        stack.enter_context(_tokens_noted(steerer.lm.model, watch, place))
        _attach(stack, steerer, watch, place)
        if action in ("clamp", "ablate"):
            stack.enter_context(steerer.applied(_edits(guard, watch, action, to)))
        yield watch


@dataclass(frozen=True)
class GuardedText:
    """A continuation that a guard watched."""

    prompt: str
    text: str
    events: Sequence[Event]
    stopped: bool


def guarded(
    guard: Guard,
    steerer: "Steerer",
    prompt: str,
    action: str = "log",
    *,
    to: float | None = None,
    on_event: OnEvent | None = None,
    **options: Any,
) -> GuardedText:
    """Continue a prompt under a guard; `options` go to `Steerer.generate`. See `watching`."""
    with watching(guard, steerer, action, to=to, on_event=on_event) as watch:
        try:
            text = steerer.generate(prompt, **options)
            stopped = False
        except GuardFired as signal:
            ids = watch.ids
            assert ids is not None
            length = 1 + len(steerer.lm.tokenizer(prompt, add_special_tokens=False)["input_ids"])
            written = ids[0, length : signal.event.position + 1].tolist()
            text, stopped = steerer.lm.tokenizer.decode(written, skip_special_tokens=True), True
            if (streamer := options.get("streamer")) is not None:
                streamer.end()
    return GuardedText(prompt, text, watch.events, stopped)


def _edits(guard: Guard, watch: Watch, action: str, to: float | None) -> list[Edit]:
    """An edit a feature, of which nothing is made before the feature fires."""
    goal = (CLAMP_TO if to is None else to) if action == "clamp" else None
    return [Edit(f, action, to=goal, schedule=partial(watch.share, f)) for f in guard.ids]


@contextmanager
def _tokens_noted(model: Any, watch: Watch, place: Place) -> Iterator[None]:
    trunk = getattr(model, "base_model", model)

    def before(_module: object, args: tuple, kwargs: dict) -> None:
        watch.note_tokens(place, kwargs.get("input_ids", args[0] if args else None))

    handle = trunk.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _attach(stack: ExitStack, steerer: "Steerer", watch: Watch, place: Place) -> None:
    """Hooks at what the dictionary reads; the last of them encodes what all have read."""
    reads = steerer.dictionary.metadata["saeql"]["identity"]["hook_point"].split(" + ")
    features = torch.tensor(watch.guard.ids, device=steerer.lm.device)
    pending: dict[str, torch.Tensor] = {}

    def read(name: str, acts: torch.Tensor) -> None:
        pending[name] = acts
        if len(pending) < len(reads):
            return
        rows = torch.cat([pending[n].float() for n in reads], dim=-1)
        pending.clear()
        with torch.no_grad():
            latents = steerer.dictionary.encode(rows.flatten(0, 1))
            is_it = latents.indices[:, :, None] == features  # [N, k, F]
            values = (latents.values.float()[:, :, None] * is_it).sum(1)
        watch.note_values(place, values.view(*rows.shape[:2], -1))

    for name in reads:
        stack.enter_context(edit_activations(steerer.lm.model, name, partial(read, name), steerer.lm.device))
