"""HellaSwag items a second on the processor, fp32: ours beside lm-evaluation-harness and the usual loop.

    python tests/benchmarks/evaluation/bench_hellaswag.py ITEMS --peers PYTHON [--count 200] [--rounds 3]
        [--batches 16,32] [--model FOLDER]

ITEMS is HellaSwag's own file of JSON lines; the first --count of it are scored. Each contender has a fresh process in
each round; its clock runs from the reading of the items to the last score, without imports and the loading of the
model. The model is a seeded GPT-2 of 4 layers, 256 wide, or that of a folder which transformers opens. Every score of
ours is compared with lm-evaluation-harness's (harness style) and with the plain loop's (completion style). The harness
runs by the Python that --peers names:

    uv venv /tmp/peers && uv pip install --python /tmp/peers/bin/python --compile-bytecode 'lm_eval[hf]'

Memory is the peak of the whole process, with torch. Linux only.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3]))

import numpy as np
import torch

from model.checkpoints.huggingface import export_run, import_folder
from model.checkpoints.records import CheckpointRecord, put_checkpoint
from model.checkpoints.weights import load_model
from model.config import ModelConfig
from model.evaluation.evaluator import Evaluator
from model.evaluation.hellaswag import CONVENTIONS, questions
from model.gpt import GPT
from model.processes.distributed import DDPConfig
from storage.stores.opening import open_store
from tests.benchmarks import contest
from tests.benchmarks.contest import RESULT, Outcome

PEERS = Path(__file__).with_name("hellaswag_peers.py")
OF_HARNESS, OF_PLAIN, MOST_BYTES, CLOSE = 3.0, 4.0, 2e9, 1e-4  # what is asked of ours


def ours(folder: str, items: str, convention: str) -> None:
    """Score the items in one convention; writes sums of the harness's, means a token of the other."""
    store = open_store("store", create=True)
    model = load_model(store, "bench", import_folder(store, "bench", Path(folder)))
    evaluator = Evaluator(model, DDPConfig(0, 1, torch.device("cpu")))
    begin = time.monotonic()
    style, _ = CONVENTIONS[convention]
    asked = [style(one) for one in questions(Path(items).read_bytes(), items)]
    losses = evaluator.ending_losses(asked)
    end = time.monotonic()
    scores = -losses if convention == "harness" else losses / np.array([one.lengths for one in asked])
    Path(RESULT).write_text(json.dumps({"begin": begin, "end": end, "scores": scores.tolist()}))


def made(folder: Path) -> Path:
    """The seeded model as transformers opens it."""
    from safetensors.torch import save

    torch.manual_seed(0)
    config = ModelConfig(layers=4, heads=4, width=256)
    model = GPT(config)
    weights = {
        name: weight[:50_257].contiguous() if ".wte." in name else weight for name, weight in model.state_dict().items()
    }
    store = open_store(str(folder / "made"), create=True)
    record = CheckpointRecord(0, "import", config.model_dump(), {})
    put_checkpoint(store, "made", {"model.safetensors": save(weights)}, record)
    export_run(store, "made", folder / "gpt2")
    return folder / "gpt2"


def compared(scores: list[list[float]], others: list[list[float]], *, likelihoods: bool) -> str:
    """The largest difference of a score, and whether every choice is the same."""
    ours_N4, theirs_N4 = np.array(scores), np.array(others)
    best = np.argmax if likelihoods else np.argmin
    same = (best(ours_N4, 1) == best(theirs_N4, 1)).sum()
    farthest = float(np.abs(ours_N4 - theirs_N4).max())
    return f"{farthest:.1e} {'yes' if farthest <= CLOSE else '**no**'}, {same} of {len(ours_N4)} choices"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", type=Path)
    parser.add_argument("--peers", required=True, help="the Python of an environment that has lm_eval")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", default="16,32", help="of lm_eval; auto is another")
    parser.add_argument("--model", type=Path)
    asked = parser.parse_args()
    peers = subprocess.run([asked.peers, str(PEERS), "versions"], capture_output=True, text=True, check=True).stdout
    print(f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {asked.rounds} rounds, {asked.count} items, "
          f"Python {platform.python_version()}, torch {torch.__version__}; peers: {peers}", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="bench-hellaswag-") as name:
        folder = Path(name)
        items = folder / "items.jsonl"
        items.write_bytes(b"".join(asked.items.read_bytes().splitlines(keepends=True)[: asked.count]))
        model = str((asked.model or made(folder)).absolute())
        mine = [sys.executable, str(Path(__file__).absolute()), "ours", model, str(items)]
        words = {f"ours, {convention} style": [*mine, convention] for convention in CONVENTIONS}
        for batch in asked.batches.split(","):
            words[f"lm_eval, batch {batch}"] = [asked.peers, str(PEERS), "lm_eval", model, str(items), batch]
        words["plain loop"] = [sys.executable, str(PEERS), "plain", model, str(items)]
        found: dict[str, list[Outcome]] = {who: [] for who in words}
        for number in range(asked.rounds):
            for who in list(words)[number % len(words) :] + list(words)[: number % len(words)]:
                found[who].append(contest.run(words[who], folder / f"{number} {who}", dict(os.environ), memory=True))
                print(f"round {number + 1}: {who}: {asked.count / found[who][-1].work_seconds:.2f} items/s",
                      file=sys.stderr)  # fmt: skip
    table(found, asked.count)


def table(found: dict[str, list[Outcome]], count: int) -> None:
    rates = {who: median(count / one.work_seconds for one in outcomes) for who, outcomes in found.items()}
    harness = max((who for who in rates if who.startswith("lm_eval")), key=rates.__getitem__)
    scores = {who: outcomes[0].result["scores"] for who, outcomes in found.items()}
    print("| contender | items/s (median) | rounds | of best lm_eval | of plain loop | peak MB | scores beside it |\n"
          "| --- | ---: | --- | ---: | ---: | ---: | --- |")  # fmt: skip
    for who, outcomes in found.items():
        peak = max(one.peak_bytes for one in outcomes)
        cells = [who, f"{rates[who]:.2f}", ", ".join(f"{count / one.work_seconds:.2f}" for one in outcomes)]
        of_harness, of_plain = rates[who] / rates[harness], rates[who] / rates["plain loop"]
        verdicts = ["", "", ""]
        if who.startswith("ours"):
            reached = (of_harness >= OF_HARNESS, of_plain >= OF_PLAIN, peak < MOST_BYTES)
            verdicts = [" yes" if one else " **no**" for one in reached]
        cells += [f"{of_harness:.2f}{verdicts[0]}", f"{of_plain:.2f}{verdicts[1]}", f"{peak / 1e6:,.0f}{verdicts[2]}"]
        beside = {"ours, harness style": harness, "ours, completion style": "plain loop"}.get(who)
        cells.append(
            f"{beside}: {compared(scores[who], scores[beside], likelihoods=beside == harness)}" if beside else ""
        )
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["ours"]:
        ours(*sys.argv[2:])
    else:
        main()
