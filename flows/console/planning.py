"""The verb `gpt2 plan`, and its measurement: a few steps of real training, on the demo's text in a temporary store."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from cyclopts import Parameter

from flows.console.options import AsJson, console, print_json, say
from flows.console.settings import DEFAULTS, RunName, Settings
from flows.demo import write_corpus
from flows.inspection import plan as planned
from flows.runtime.processes import Processes
from model import tokenizer
from model.checkpoints.records import read_metrics
from model.config import RunConfig
from model.config_file import config_of
from model.runs.job import put_job
from model.runs.run import pin_run, training_job
from storage.datasets.building import build_here
from storage.sources.mirror import list_source
from storage.stores.opening import open_store

Measure = Annotated[bool, Parameter(help="Train 80 steps first to measure this host's speed (a minute or two).")]
STEPS, WARMUP_STEPS = 80, 20
MOST_BATCH_TOKENS = 65_536  # of the measured steps: enough to hide the optimizer's step, less than the text has


def plan(
    name: RunName = None, /, *, settings: Settings = DEFAULTS, measure: Measure = False, as_json: AsJson = False
) -> None:
    """Show what a run takes before it starts: tokens, epochs, disk, GPU memory, hours, price.

    The speed is measured (--measure), taken from a run in this store, or estimated from the GPU's data sheet.

    Example: gpt2 plan --config gpt2-124m --set resources.price_per_gpu_hour=2.5
    Next: gpt2 pretrain with the same options
    """
    config = settings.run(name)
    with console.status("training a few steps"):
        result = planned.plan(config, tokens_per_second if measure else None)
    if as_json:
        print_json(vars(result))
        return
    for label, text in result.lines().items():
        say(label, text)


def tokens_per_second(config: RunConfig, gpus: int) -> float:
    """The speed of the configured training, if all hosts are as fast as this one. Raises ValueError or JobFailed."""
    hosts, batch_tokens = config.resources.nodes, config.train.batch_tokens
    unit_tokens = batch_tokens // config.train.micro_batches(gpus // hosts)  # at least a micro-batch on each process
    batch_tokens = min(batch_tokens, max(MOST_BATCH_TOKENS // unit_tokens, 1) * unit_tokens)
    with TemporaryDirectory() as folder:
        values = config.model_dump(mode="json")
        values["resources"]["nodes"] = 1
        train = {"max_steps": STEPS, "warmup_steps": 0, "batch_tokens": batch_tokens, "start_from": "", "mix": []}
        train |= {"checkpoint_every_steps": STEPS, "validate_every_steps": 0, "patience_validations": 0}
        values["train"] |= train
        write_corpus(text := Path(folder) / "text")
        values["data"] = {"dataset": "text", "source": str(text), "val_shards": 1, "shard_tokens": 20_000}
        config = config_of(values | {"name": "measured", "store_url": f"{folder}/store"}, [])
        store = open_store(config.store_url, create=True)
        data, spec = config.data, config.data.spec(tokenizer.identity())
        listing, _ = list_source(store, data.source, data.config, data.revision, "train")
        manifest = build_here(store, spec, listing, tokenizer.encode, tokenizer.decode_bytes, eot=tokenizer.EOT)
        run = pin_run(store, config, manifest.digest, None)
        with Processes(config.store_url) as processes:
            processes.run(put_job(store, training_job(run)), lambda _: None)
        lines = read_metrics(store, run.name)[WARMUP_STEPS:]
    seconds: float = sum(line.step_seconds + line.metrics_seconds for line in lines)
    return hosts * len(lines) * batch_tokens / seconds
