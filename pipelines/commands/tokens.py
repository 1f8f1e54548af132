"""The command that asks whether positions still stand for their tokens."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .common import RunPath


def tokens(
    run: RunPath,
    *,
    layers: Annotated[
        str | None, Parameter(help="Layers such as 0,5,10-15. Default: all, and what the first one reads.")
    ] = None,
    train_tokens: Annotated[
        int | None, Parameter(help="Train tokens that the linear maps are fitted on (token_identity.train_tokens).")
    ] = None,
    test_tokens: Annotated[
        int | None, Parameter(help="Test tokens that identity is measured on (token_identity.test_tokens).")
    ] = None,
    features: Annotated[
        int | None, Parameter(help="Features whose own token is masked, 0 for none (token_identity.features).")
    ] = None,
    out: Annotated[
        Path | None, Parameter(help="Folder of token_identity.json and .png. Default: RUN/token_identity.")
    ] = None,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
) -> None:
    """How well tokens are still found in the activations of every layer, and whether features rest on their own token.

    Example: saeql tokens runs/demo --layers 0-29 --features 100
    """
    from dataclasses import replace
    from json import dumps

    from ..run import Run
    from ..token_identity_report import layer_numbers, measure, print_tokens, write_tokens
    from ..verify import recorded

    opened = Run.open(run)
    given = {"train_tokens": train_tokens, "test_tokens": test_tokens, "features": features}
    config = replace(opened.config.token_identity, **{key: value for key, value in given.items() if value is not None})
    report = measure(opened, config, None if layers is None else layer_numbers(layers))
    folder = out or opened.path / "token_identity"
    if out is None:
        with opened.locked(), recorded(opened.path, "tokens"):
            write_tokens(report, folder)
    else:
        write_tokens(report, folder)
    if json:
        print(dumps(report.to_dict(), ensure_ascii=False))
    else:
        print_tokens(report, folder)
