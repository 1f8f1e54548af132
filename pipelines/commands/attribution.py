"""The command that asks what caused a prediction: why."""

from typing import Annotated

from cyclopts import Parameter

from .common import RunPath


def why(
    run: RunPath,
    *,
    prompt: Annotated[str, Parameter(help="Text whose next token is explained.")],
    token: Annotated[str | None, Parameter(help='The next token, such as " Paris"; unset: the likeliest.')] = None,
    against: Annotated[str | None, Parameter(help="Explain the logit of --token less that of this token.")] = None,
    measure: Annotated[str, Parameter(help="logit, or logprob: the log-probability.")] = "logit",
    position: Annotated[
        int,
        Parameter(
            help="Token of the prompt whose prediction is explained: 0 the first (the BOS), -1 the last.",
            allow_leading_hyphen=True,
        ),
    ] = -1,
    steps: Annotated[int, Parameter(help="Steps of integrated gradients; 1: the gradient as it is.")] = 1,
    top: Annotated[int, Parameter(help="Features shown, each ablated.")] = 20,
    ablate: Annotated[
        int, Parameter(help="Pairs of feature and token ablated one by one: so many strongest, and so many at random.")
    ] = 50,
    feature: Annotated[int | None, Parameter(help="With --feeds: the feature that is asked about.")] = None,
    feeds: Annotated[
        str | None,
        Parameter(
            help="Which features of this later dictionary --feature feeds: a name in the run, another run, or a folder "
            "or file."
        ),
    ] = None,
    at: Annotated[str, Parameter(help="Hook point that --feeds reads, where it does not say so.")] = "",
    seed: Annotated[int, Parameter(help="Of the random pairs.")] = 0,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
    csv: Annotated[bool, Parameter(help="Print CSV.", negative="")] = False,
) -> None:
    """Which features caused the next token of a prompt; or which later features a feature feeds.

    Example: saeql why runs/demo --prompt "The capital of France is" --token " Paris"
    """
    from ..attribution.feeds import feeds as feed
    from ..attribution.of_run import labels_of, later_dictionary
    from ..attribution.report import print_feeds, print_why
    from ..attribution.target import WhyError
    from ..run import Run

    if json and csv:
        raise WhyError("--json and --csv name one format: give one of them")
    if (feature is None) != (feeds is None):
        raise WhyError("--feature and --feeds ask together which later features one feeds: give both, or neither")
    style = "json" if json else "csv" if csv else "table"
    opened = Run.open(run)
    if feature is not None and feeds is not None:
        if token is not None or against is not None or steps != 1:
            raise WhyError("--feeds is about a later dictionary, not a token: leave --token, --against and --steps out")
        later, owner = later_dictionary(opened, opened.attributor, feeds, at)
        found = feed(opened.attributor, feature, later, prompt, position=position, top=top)
        print_feeds(found, labels_of(owner, [f.feature for f in found.fed]), style)
        return
    answer = opened.why(
        prompt,
        token,
        against=against,
        measure=measure,
        position=position,
        steps=steps,
        top=top,
        ablate=ablate,
        seed=seed,
    )
    shown = [*(f.feature for f in answer.features), *(p.feature for p in answer.pairs[:top])]
    shown += [t.feature for t in answer.by_token if t.feature is not None]
    print_why(answer, labels_of(opened, shown), style, top=top)
