"""Whether SAEDashboard's own exporter turns our SAEDashboard JSON into our Neuronpedia files.

    saeql export RUN pages --format saedashboard
    saeql export RUN bulk --format neuronpedia --creator me
    python scripts/check_dashboards.py pages bulk        # sae-dashboard in the same environment

What differs by intent is left out: ids, times, the nearest features (SAEDashboard has none), the largest activation (we
keep all its digits), and columns that stay empty for an SAE.
"""

import argparse
import gzip
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from sae_dashboard.neuronpedia.neuronpedia_export import (  # pyright: ignore[reportMissingImports]
    NeuronpediaExportConfig,
    export_neuronpedia_dashboards,
)

_BY_INTENT = {
    "features": {"createdAt", "maxActApprox", "vectorDefaultSteerStrength", "topkCosSimIndices", "topkCosSimValues",
                 "sourceSetName"},
    "activations": {"id", "createdAt", "zIndices", "zValues"},
}  # fmt: skip


def read(folder: Path) -> list[dict[str, Any]]:
    """Rows of all batches in the order of features."""
    files = sorted(folder.glob("batch-*.jsonl.gz"), key=lambda f: int(f.name.split("-")[1].split(".")[0]))
    return [json.loads(line) for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, help="what --format saedashboard wrote")
    parser.add_argument("bulk", type=Path, help="what --format neuronpedia wrote")
    arguments = parser.parse_args()
    source = json.loads(next(arguments.bulk.rglob("source.jsonl")).read_text())
    ours = next(arguments.bulk.rglob("source.jsonl")).parent
    feature = read(ours / "features")[0]
    layer, _, _ = source["id"].partition("-")
    with tempfile.TemporaryDirectory() as folder:
        theirs = export_neuronpedia_dashboards(
            NeuronpediaExportConfig(
                saedashboard_output_dir=str(arguments.pages),
                exports_dir=folder,
                creator_name="",
                creator_id=source["creatorId"],
                release_id="",
                release_title="",
                url="",
                model_name=source["modelId"],
                neuronpedia_source_set_id=source["setName"],
                neuronpedia_source_set_description="",
                hf_weights_repo_id="",
                hf_weights_path="",
                hook_point=feature["hookName"].removeprefix(f"blocks.{layer}."),
                layer_num=int(layer),
                prompts_huggingface_dataset_path="",
                n_prompts_total=0,
                n_tokens_in_prompt=0,
            )
        )
        different = []
        for kind, left_out in _BY_INTENT.items():
            mine, other = (sorted(read(f / kind), key=lambda row: int(row["index"])) for f in (ours, Path(theirs)))
            print(f"{kind}: {len(mine)} and {len(other)} rows")
            if len(mine) != len(other):
                different.append(f"{kind}: number of rows")
            for a, b in zip(mine, other, strict=False):
                keys = (a.keys() | b.keys()) - left_out
                different += [f"{kind} of {a['index']}: {k}" for k in keys if str(a.get(k)) != str(b.get(k))]
    print(f"{len(different)} differences", *different[:20], sep="\n")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
