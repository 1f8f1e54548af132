"""The command that prunes a model by what chosen features need."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .common import RunPath, refuse_ranks


def prune(
    run: RunPath,
    *,
    features: Annotated[
        list[str] | None,
        Parameter(name=["--feature", "--features"], help="Feature to keep; as often as wanted.", negative=""),
    ] = None,
    search: Annotated[str | None, Parameter(help="Keep features that these words find (--top of them).")] = None,
    where: Annotated[
        str | None, Parameter(help="Keep features that meet this SQL condition on the view features (--top of them).")
    ] = None,
    top: Annotated[
        int, Parameter(help="Features taken of --search and --where; alone: of all that have a label, the best.")
    ] = 8,
    what: Annotated[str, Parameter(help="mlp (neurons), heads, or both.")] = "both",
    shares: Annotated[str, Parameter(help="Shares of the units that are pruned, each measured.")] = "0.1,0.2,0.4",
    methods: Annotated[
        str, Parameter(help="features, loss, activation, magnitude, random: what says which units go.")
    ] = "features,loss,activation,magnitude,random",
    across: Annotated[
        str, Parameter(help="layer: the same share of every layer; model: the least of all together.")
    ] = "layer",
    task: Annotated[
        str, Parameter(help="Probe before and after: a planted concept or a labelled file; empty: none.")
    ] = "conjunction-that",
    level: Annotated[str, Parameter(help="What a labelled file labels: document or token.")] = "document",
    calibration_windows: Annotated[int, Parameter(help="Windows that worth is measured on.")] = 64,
    loss_windows: Annotated[int, Parameter(help="Test windows that cross-entropy is measured on.")] = 32,
    feature_windows: Annotated[int, Parameter(help="Test windows on which the chosen features are active.")] = 48,
    random_seeds: Annotated[int, Parameter(help="Times that random pruning is drawn.")] = 3,
    out: Annotated[
        Path | None, Parameter(help="With --share: folder for the pruned model; else for pruning.json and .png.")
    ] = None,
    share: Annotated[
        float | None, Parameter(help="Write the model pruned to this share by the first method, in place of a curve.")
    ] = None,
    cut: Annotated[bool, Parameter(help="Cut neurons out where all layers lose as many.", negative="--zero")] = True,
    seed: Annotated[int, Parameter(help="Seed of what is drawn.")] = 0,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
) -> None:
    """Prune MLP neurons and attention heads that chosen features do not need, against other ways to choose.

    Without --share: a curve of cross-entropy, of what is left of the features, and of a probe, at every share.

    Example: saeql prune runs/demo --search music --top 8 --shares 0.1,0.2,0.4 --out pruned
    """
    from ..output import note
    from ..progress import progress
    from ..pruning.checkpoint import check_free, write_checkpoint
    from ..pruning.curve import PruneOptions, Pruner
    from ..pruning.report import print_curve
    from ..pruning.units import PruneError
    from ..run import Run
    from ..steering.selection import chosen_features

    refuse_ranks()
    try:
        numbers = (share,) if share is not None else tuple(float(part) for part in shares.split(","))
    except ValueError:
        raise PruneError(f"--shares {shares!r}: numbers such as 0.1,0.2,0.4") from None
    if share is not None and out is None:
        raise PruneError("--share writes a pruned model: name its folder with --out")
    if share is not None and out is not None:
        check_free(out)
    opened = Run.open(run)
    if not features and search is None and where is None:
        where = "kind != 'none'"
    with opened.store() as store:
        found = chosen_features(store, features or (), search=search, where=where, top=top)
    kept = tuple(dict.fromkeys(found))
    options = PruneOptions(
        kept, what, numbers, tuple(methods.split(",")), across, random_seeds, calibration_windows, loss_windows,
        feature_windows, task, level, seed,
    )  # fmt: skip
    with progress("worth", None, "windows") as advance:
        pruner = Pruner(opened, options, advance)
    if share is not None and out is not None:
        method = options.methods[0]
        masks = pruner.masks(method, share, seed)
        about = {"method": method, "features": list(kept), "share": share, **pruner.sparsity(masks)}
        was_cut = write_checkpoint(pruner.lm, pruner.units, masks, out, about, cut=cut)
        note(f"wrote {out}: {about['parameter_share']:.1%} of the parameters {'cut out' if was_cut else 'zeroed'}")
        return
    rounds = len(numbers) * sum(random_seeds if m == "random" else 1 for m in options.methods)
    with progress("prune", rounds, "models") as advance:
        curve, missing = pruner.curve(advance)
    if missing:
        note(f"no probe: {missing}")
    if out is not None:
        curve.save(out)
        note(f"wrote {out}/pruning.json and pruning.png")
    print_curve(curve, as_json=json)
