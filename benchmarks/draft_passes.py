"""What drafts cost in passes of the bundled model: `python -m braid.benchmarks.draft_passes [--threads N]`.

Main passes and passes of the MTP module of one sequence by their number of rows, over held-out text, so that every pass
asks for other experts, as it does in service. Run it from outside the repository's folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from braid.benchmarks.roofline import timed
from braid.benchmarks.speculation import BUNDLED, held_out
from braid.model.checkpoint import Checkpoint
from braid.model.config import ModelConfig
from braid.model.deepseek import Batch, DeepSeekModel, Segment
from braid.model.experts import LocalExperts
from braid.model.families import ops_for
from braid.model.kv_cache import LatentCache
from braid.model.mtp import MtpModule
from braid.model.weights import load_attention, load_experts

DTYPE = torch.bfloat16
ROWS = (1, 2, 3)
TABLE = [2, 0, 1]


def load(config: ModelConfig, threads: int) -> tuple[DeepSeekModel, MtpModule]:
    checkpoint, ops = Checkpoint(BUNDLED), ops_for(DTYPE)
    ops.set_threads(threads)
    num_layers = config.num_hidden_layers + 1
    every = range(config.n_routed_experts or 0)
    experts = LocalExperts(load_experts(checkpoint, config, range(num_layers), every, DTYPE, ops=ops))
    weights = load_attention(checkpoint, config, DTYPE, has_mtp=True, ops=ops)
    cache = LatentCache(config, len(TABLE), DTYPE, num_layers)
    model = DeepSeekModel(config, weights, cache, experts)
    return model, MtpModule(config, weights.mtp[0], cache, experts, model.rope)


def walking(text: torch.Tensor, num_rows: int, run: Callable[[int], object]) -> Callable[[], None]:
    """Each call runs the next `num_rows` positions of the text, from its start again where it ends."""
    at = 0

    def step() -> None:
        nonlocal at
        run(at)
        at = at + num_rows if at + 2 * num_rows < len(text) else 0

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=400)
    args = parser.parse_args()
    model, module = load(ModelConfig.from_path(BUNDLED), args.threads)
    text = torch.tensor(held_out(1)[0])
    for num_rows in ROWS:
        rows = torch.arange(num_rows)

        def verify(at: int, num: int = num_rows, rows: torch.Tensor = rows) -> torch.Tensor:
            return model.forward(Batch(text[at : at + num], [Segment(at, num, TABLE, True)], rows)).hidden

        hidden = verify(0)

        def draft(at: int, num: int = num_rows, hidden: torch.Tensor = hidden) -> None:
            module.draft(hidden, text[at + 1 : at + num + 1], [Segment(at, num, TABLE, True)], torch.tensor([num - 1]))

        for name, run in (("main", verify), ("module", draft)):
            median_s, best_s = timed(walking(text, num_rows, run), args.repeats)
            print(f"{name:6} {num_rows} rows: least {1e6 * best_s:4.0f} us, median {1e6 * median_s:4.0f} us")


if __name__ == "__main__":
    main()
