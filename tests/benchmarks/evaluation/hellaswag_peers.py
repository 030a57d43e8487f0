"""Contenders of bench_hellaswag.py that know nothing of this project; run by a Python that has them installed.

    python hellaswag_peers.py versions
    python hellaswag_peers.py lm_eval MODEL ITEMS BATCH       its own task, items from a file of JSON lines
    python hellaswag_peers.py plain MODEL ITEMS               completion style, item by item, as the usual loop has it

MODEL is a folder that transformers opens. Each writes result.json: begin and end of its work (reading of the items and
tokenising within), and each item's four scores: log-likelihoods, or the losses a token of the plain one.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

TASK = """
include: {package}/tasks/hellaswag/hellaswag.yaml
task: local_items
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {items}
training_split: null
"""


def lm_eval(model, items, batch):
    """Zero-shot, fp32, on the processor."""
    import lm_eval as harness
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager, get_task_dict

    Path("local_items.yaml").write_text(TASK.format(package=Path(harness.__file__).parent, items=items))
    size = batch if batch == "auto" else int(batch)
    lm = HFLM(pretrained=model, tokenizer=model, batch_size=size, dtype="float32", device="cpu")
    manager = TaskManager(include_path=".")
    begin = time.monotonic()
    task = get_task_dict(["local_items"], manager)
    found = harness.evaluate(lm, task, log_samples=True, bootstrap_iters=0)
    end = time.monotonic()
    samples = sorted(found["samples"]["local_items"], key=lambda sample: sample["doc_id"])
    scores = [[answer[0] for answer in sample["filtered_resps"]] for sample in samples]
    metrics = {name: found["results"]["local_items"][f"{name},none"] for name in ("acc", "acc_norm")}
    return {"begin": begin, "end": end, "scores": scores, "metrics": metrics}


def plain(model, items):
    """Four padded rows an item, all logits, the mean loss of the ending's tokens."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gpt2, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    begin = time.monotonic()
    scores = []
    for line in Path(items).read_text().splitlines():
        item = json.loads(line)
        context = tokenizer.encode(item["ctx"])
        endings = [tokenizer.encode(" " + ending) for ending in item["endings"]]
        width = len(context) + max(map(len, endings))
        tokens = torch.zeros(4, width, dtype=torch.long)
        scored = torch.zeros(4, width)
        for row, ending in enumerate(endings):
            tokens[row, : len(context) + len(ending)] = torch.tensor(context + ending)
            scored[row, len(context) : len(context) + len(ending)] = 1
        with torch.no_grad():
            logits = gpt2(tokens).logits
        losses = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(4, -1)
        scores.append(((losses * scored[:, 1:]).sum(1) / scored[:, 1:].sum(1)).tolist())
    return {"begin": begin, "end": time.monotonic(), "scores": scores}


if __name__ == "__main__":
    name, *words = sys.argv[1:]
    if name == "versions":
        print(", ".join(f"{package} {version(package)}" for package in ("lm_eval", "transformers", "torch")))
    else:
        Path("result.json").write_text(json.dumps({"lm_eval": lm_eval, "plain": plain}[name](*words)))
