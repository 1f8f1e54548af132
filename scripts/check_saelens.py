"""Load a dictionary of ours in SAELens itself and compare both encoders and decoders on the same rows.

    python scripts/check_saelens.py runs/demo/dictionaries/topk_4608_k32

Needs sae-lens (6 or newer) beside saeql: pip install sae-lens. Exits 1 where they disagree by more than 1e-5 relative.
"""

import sys

import torch

from saeql.pipelines import load_dictionary


def main(folder: str) -> int:
    """Compare on rows drawn around the dictionary's own bias, at the scale of its activations."""
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    ours = load_dictionary(folder)
    theirs = SAE.load_from_disk(folder, device="cpu")
    torch.manual_seed(0)
    scale = float(next(iter(ours.metadata["saeql"]["median_norms"].values()))) / ours.d_in**0.5
    x = ours.b_dec.detach() + torch.randn(256, ours.d_in) * scale
    with torch.no_grad():
        latents = ours.encode(x)
        dense = torch.zeros(len(x), ours.d_sae).scatter_(1, latents.indices.long(), latents.values)
        pairs = {"encode": (dense, theirs.encode(x)), "forward": (ours(x), theirs(x))}
    failed = False
    for name, (a, b) in pairs.items():
        error = float((a - b).abs().max() / b.abs().max())
        failed |= not error <= 1e-5
        print(f"{name}: largest difference {error:.2e} of the largest value, shape {tuple(b.shape)}")
    print(f"architecture {theirs.cfg.architecture()}, hook_name {theirs.cfg.metadata.hook_name}")
    failed |= theirs.cfg.metadata.hook_name != ours.metadata["hook_name"]
    return int(failed)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
