"""Fine-tunes a small model on text of your own, with checkpoints on the way, for `saeql dynamics`.

    python scripts/finetune_small.py embedded:smollm2-135m-instruct new.jsonl tuned --steps 200 --checkpoints 2

writes tuned/step-0, tuned/step-100 and tuned/step-200 as folders of transformers.
"""

import argparse
from pathlib import Path

import torch

from saeql.pipelines.dynamics.fine_tuning import FineTuning, fine_tune
from saeql.pipelines.model_config import ModelConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", help="a file or folder as a corpus takes it (.txt, .jsonl, .parquet)")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--checkpoints", type=int, default=2)
    parser.add_argument("--batch-windows", type=int, default=8)
    parser.add_argument("--context-tokens", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    options = FineTuning(
        given.steps, given.checkpoints, given.batch_windows, given.context_tokens, given.learning_rate, given.seed
    )

    def told(step: int, loss: float) -> None:
        if step % 10 == 0 or step == 1:
            print(f"step {step:5d}  loss {loss:.3f}", flush=True)

    for folder in fine_tune(ModelConfig(name=given.model), given.text, given.out, options, on_step=told):
        print(folder)


if __name__ == "__main__":
    main()
