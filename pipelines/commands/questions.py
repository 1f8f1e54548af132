"""Commands that ask a finished run: search, show, sql, steer."""

from typing import Annotated

from cyclopts import Parameter

from .common import RunPath


def search(
    run: RunPath,
    text: Annotated[
        str | None, Parameter(help="Words to look for in labels and in promoted and activating tokens.")
    ] = None,
    *,
    token: Annotated[str | None, Parameter(help='Features that fire on this token, such as " bank".')] = None,
    effect: Annotated[str | None, Parameter(help="Features that raise the logit of this token.")] = None,
    prompt: Annotated[str | None, Parameter(help="Features that fire on this text; loads the model.")] = None,
    like: Annotated[int | None, Parameter(help="Features whose decoder row is nearest to that of this one.")] = None,
    among: Annotated[
        str | None, Parameter(help="With --like: another dictionary to look in, a name in the run or a folder or file.")
    ] = None,
    limit: Annotated[int, Parameter(help="Number of features.")] = 10,
    where: Annotated[str | None, Parameter(help="SQL condition on the view features.")] = None,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
) -> None:
    """Find features by words, token, effect, text or direction, best first, with what matched.

    Example: saeql search runs/demo "music" --where "density < 0.01"
    """
    from ..output import print_hits
    from ..run import Run
    from ..search import find

    opened = Run.open(run)
    with opened.store() as store:
        asked = {"words": text, "token": token, "effect": effect, "prompt": prompt, "like": like}
        print_hits(*find(opened, store, asked, among=among, limit=limit, where=where), as_json=json)


def show(
    run: RunPath,
    feature: Annotated[int, Parameter(help="Feature id.")],
    *,
    examples: Annotated[int, Parameter(help="Number of top examples.")] = 5,
    split: Annotated[str, Parameter(help="Split of the examples: train or test.")] = "train",
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
) -> None:
    """One feature: label and score, statistics, promoted tokens, neighbours, top examples.

    Example: saeql show runs/demo 123
    """
    from ..output import print_feature
    from ..run import Run

    with Run.open(run).store() as opened:
        print_feature(opened, feature, num_examples=examples, split=split, as_json=json)


def sql(
    run: RunPath,
    query: Annotated[
        str,
        Parameter(
            help="SQL over the views dictionaries, features, examples, documents, labels, "
            "neighbours, logit_effects, activations, metrics."
        ),
    ],
    *,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
    csv: Annotated[bool, Parameter(help="Print CSV.", negative="")] = False,
    max_rows: Annotated[int, Parameter(help="Rows to print at most.")] = 1000,
) -> None:
    """Ask the feature store in SQL. Read-only.

    Example: saeql sql runs/demo "SELECT feature, label, density FROM features ORDER BY density DESC LIMIT 5"
    """  # fmt: skip
    from ..output import print_records
    from ..run import Run

    with Run.open(run).store() as opened:
        table = opened.sql(query, max_rows=max_rows)
    rows = [list(row.values()) for row in table.to_pylist()]
    print_records(table.column_names, rows, "json" if json else "csv" if csv else "table")


def steer(
    run: RunPath,
    *,
    feature: Annotated[int, Parameter(help="Feature id.")],
    prompt: Annotated[str, Parameter(help="Text to continue.")],
    strength: Annotated[
        float,
        Parameter(
            help="add: share of the median activation norm (0.1 to 0.5); clamp: multiple "
            "of the feature's largest activation."
        ),
    ] = 0.4,
    mode: Annotated[str, Parameter(help="add, clamp or ablate.")] = "add",
    tokens: Annotated[int, Parameter(help="Tokens to write.")] = 40,
    allow_mismatch: Annotated[
        bool, Parameter(help="Steer a model that the dictionary was not trained on.", negative="")
    ] = False,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
) -> None:
    """Continue a prompt with and without a feature, side by side.

    Example: saeql steer runs/demo --feature 123 --strength 0.4 --prompt "I think that"
    """  # fmt: skip
    from ..output import print_steering
    from ..run import Run
    from ..steer import Edit

    steerer = Run.open(run).steerer(allow_mismatch=allow_mismatch)
    edits = [Edit(feature, mode, strength)]
    steered = steerer.generate(prompt, edits, max_new_tokens=tokens)
    baseline = steerer.generate(prompt, [], max_new_tokens=tokens)
    print_steering(edits[0], prompt, baseline, steered, as_json=json)
