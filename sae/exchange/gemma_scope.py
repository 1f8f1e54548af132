"""Gemma Scope (arXiv 2408.05147): one `params.npz` of jumprelu weights in a folder named after its width. Read only.

Layout in the file: `W_enc` [d_in, d_sae], `W_dec` [d_sae, d_out], `b_enc`, `b_dec`, `threshold` [d_sae]; older files
say `w_enc` and `w_dec`. The encoder reads x itself. A dictionary of embeddings reads them before Gemma multiplies them
by sqrt(d_in).
"""

import re
from pathlib import Path

from .files import TensorFile, read_npz
from .weights import DictionaryWeights

WEIGHTS_FILE = "params.npz"
#: Folders of a release that say what the dictionary is.
NAMED = re.compile(r"gemma-scope|transcoder|embedding$|layer_\d|width_\d|average_l0_\d|canonical$")


def read(folder: Path) -> DictionaryWeights:
    """A dictionary of the folder. Raises ExchangeError naming file and field."""
    file = read_npz(folder / WEIGHTS_FILE)
    renamed = {("W_" + name[2:] if name.startswith("w_") else name): tensor for name, tensor in file.data.items()}
    file = TensorFile(file.path, renamed)
    d_in, d_sae = file.shape("W_enc", 2)
    d_out = file.shape("W_dec", 2)[1]
    tensors = {
        "W_enc": file.take("W_enc", (d_in, d_sae), transpose=True),
        "b_enc": file.take("b_enc", (d_sae,)),
        "W_dec": file.take("W_dec", (d_sae, d_out)),
        "b_dec": file.take("b_dec", (d_out,)),
        "threshold": file.take("threshold", (d_sae,)),
    }
    is_transcoder = d_in != d_out or any("transcoder" in part for part in folder.absolute().parts)
    weights = DictionaryWeights(
        architecture="jumprelu",
        form="transcoder" if is_transcoder else "autoencoder",
        d_in=d_in,
        d_out=d_out,
        d_sae=d_sae,
        tensors=tensors,
        metadata={"gemma_scope": "/".join(part for part in folder.absolute().parts if NAMED.match(part))},
    )
    return weights.validate(file.path)
