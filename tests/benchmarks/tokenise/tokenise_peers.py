"""Contenders of bench_tokenise.py that other projects' programs make; run by a Python that has them installed.

    python tokenise_peers.py versions
    python tokenise_peers.py datatrove|litdata|mosaicml|datasets CORPUS SHARD_TOKENS

Imports nothing of this project. Each tokenises all documents of CORPUS with 2 workers, ends each with EOT, and writes
files of about SHARD_TOKENS tokens where the peer can. Its clock begins when both workers have imported what they need
and read the vocabulary: start-up counts apart. The encoding comes from TIKTOKEN_CACHE_DIR, nothing is fetched.
"""

import hashlib
import json
import os
import sys
import time
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

WORKERS = 2
EOT = 50_256
ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # tiktoken names its files by this
PACKAGES = {  # as they are imported and as they are installed
    "datatrove.pipeline.tokens": "datatrove[io]",
    "litdata": "litdata",
    "streaming": "mosaicml-streaming",
    "datasets": "datasets",
    "tiktoken": "tiktoken",
    "tokenizers": "tokenizers",
}


def answer(begin, end, tokens):
    Path("result.json").write_text(json.dumps({"begin": begin, "end": end, "tokens": int(tokens)}))


@cache
def start_together(folder):
    """Returns when every worker has come so far; asked again, at once. When the last one came, the work began."""
    (Path(folder) / f"ready-{os.getpid()}").write_text(str(time.monotonic()))
    while len(list(Path(folder).glob("ready-*"))) < WORKERS:
        time.sleep(0.01)


def began(folder):
    return max(float(path.read_text()) for path in Path(folder).glob("ready-*"))


def encode(text):
    """The document's ids, uint16, EOT last: what these peers are handed at best, no lists of Python's integers."""
    import numpy as np

    ids = gpt2().encode_to_numpy(text, disallowed_special=())
    tokens = np.empty(len(ids) + 1, np.uint16)
    tokens[:-1] = ids
    tokens[-1] = EOT
    return tokens


@cache
def gpt2():
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    encoding.encode_ordinary("warm")
    return encoding


def files_of(corpus):
    return sorted(str(path) for path in Path(corpus).glob("*.parquet"))


def texts_of(path, group):
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as parquet:
        return parquet.read_row_group(group, columns=["text"]).column(0).to_pylist()


def groups_of(corpus):
    """Row groups: pieces of work small enough for two workers to end together."""
    import pyarrow.parquet as pq

    return [(path, group) for path in files_of(corpus) for group in range(pq.ParquetFile(path).num_row_groups)]


def datatrove(corpus, shard_tokens):  # without a shuffle it writes one file a task
    """tokenizers' BPE in batches of 500, two tasks; its defaults (a shuffle, batches of 10,000) are slower."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    kept = Path(os.environ["TIKTOKEN_CACHE_DIR"])
    ranks, merges = (str(kept / hashlib.sha1(f"{ADDRESS}{name}".encode()).hexdigest()) for name in  # noqa: S324
                     ("encoder.json", "vocab.bpe"))  # fmt: skip
    gpt2_json = Tokenizer(models.BPE.from_file(ranks, merges))
    gpt2_json.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    gpt2_json.decoder = decoders.ByteLevel()
    gpt2_json.save("gpt2.json")
    here = str(Path.cwd())

    class Warmed(DocumentTokenizer):
        def run(self, data, rank=0, world_size=1):
            assert self.tokenizer is not None  # loads it
            start_together(here)
            return super().run(data, rank, world_size)

    writer = Warmed(
        f"{here}/out", f"{here}/gpt2.json", eos_token="<|endoftext|>",  # noqa: S106
        shuffle_documents=False, batch_size=500, save_final_metadata=False,
    )  # fmt: skip
    reader = ParquetReader(str(Path(corpus).absolute()), glob_pattern="*.parquet", recursive=False)
    LocalPipelineExecutor([reader, writer], tasks=WORKERS, workers=WORKERS, logging_dir=f"{here}/logs").run()
    end = time.monotonic()
    made = sum(path.stat().st_size // 2 for path in Path("out").glob("*.ds"))
    answer(began(here), end, made)


class LitTokens:
    """Tokens of one row group, document by document."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, item):
        gpt2()
        start_together(self.folder)
        for text in texts_of(*item):
            yield encode(text)


def litdata(corpus, shard_tokens):
    import litdata as peer

    here = str(Path.cwd())
    peer.optimize(
        fn=LitTokens(here), inputs=groups_of(corpus), output_dir=f"{here}/out", chunk_size=shard_tokens,
        num_workers=WORKERS, item_loader=peer.TokensLoader(), reorder_files=False, verbose=False,
    )  # fmt: skip
    end = time.monotonic()
    chunks = json.loads(Path("out/index.json").read_text())["chunks"]
    answer(began(here), end, sum(chunk["dim"] for chunk in chunks))


SAMPLE_TOKENS = 2_048  # llm-foundry's shape: documents run on, cut into samples of equal length


def write_mds(folder, number, items, shard_tokens):
    import numpy as np
    from streaming import MDSWriter

    gpt2()
    start_together(folder)
    left = np.empty(0, np.uint16)
    with MDSWriter(
        out=f"{folder}/out/{number}", columns={"tokens": "ndarray:uint16"}, size_limit=2 * shard_tokens
    ) as writer:
        for item in items:
            for text in texts_of(*item):
                left = np.concatenate((left, encode(text)))
                whole = len(left) - len(left) % SAMPLE_TOKENS
                for start in range(0, whole, SAMPLE_TOKENS):
                    writer.write({"tokens": left[start : start + SAMPLE_TOKENS]})
                left = left[whole:]
        if len(left):
            writer.write({"tokens": left})


def mosaicml(corpus, shard_tokens):
    """An MDSWriter in each of two processes, as its documentation says to write in parallel; then one index of all."""
    from multiprocessing import get_context

    from streaming import StreamingDataset
    from streaming.base.util import merge_index

    here, items, context = str(Path.cwd()), groups_of(corpus), get_context("fork")
    writers = [
        context.Process(target=write_mds, args=(here, number, items[number::WORKERS], shard_tokens))
        for number in range(WORKERS)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    merge_index(f"{here}/out")
    end = time.monotonic()
    made = StreamingDataset(local=f"{here}/out", batch_size=1)
    answer(began(here), end, sum(len(made[index]["tokens"]) for index in range(len(made))))


def with_ids(row):
    ids = encode(row["text"])
    return {"ids": ids, "length": len(ids)}


def datasets(corpus, shard_tokens):
    """nanoGPT's prepare.py: map with two processes into Arrow files, then one array after another is written."""
    import datasets as peer
    import numpy as np

    gpt2()
    peer.disable_progress_bars()
    begin = time.monotonic()
    loaded = peer.load_dataset("parquet", data_files=files_of(corpus), split="train", columns=["text"], cache_dir="in")
    features = peer.Features({"ids": peer.List(peer.Value("uint16")), "length": peer.Value("int64")})
    mapped = loaded.map(with_ids, remove_columns=["text"], features=features, num_proc=WORKERS)
    shards = -(-sum(mapped["length"]) // shard_tokens)
    for number in range(shards):
        part = mapped.shard(shards, number, contiguous=True).with_format("numpy")
        np.save(f"shard-{number:06d}", np.concatenate(part["ids"][:]))
    end = time.monotonic()
    answer(begin, end, sum(len(np.load(path, mmap_mode="r")) for path in Path().glob("shard-*.npy")))


def versions():
    for module, package in PACKAGES.items():
        try:
            import_module(module)
        except ImportError as error:
            sys.exit(f"{package} cannot be imported ({error})")
    print(json.dumps({package.partition("[")[0]: version(package.partition("[")[0]) for package in PACKAGES.values()}))


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what == "versions":
        versions()
    else:
        {"datatrove": datatrove, "litdata": litdata, "mosaicml": mosaicml, "datasets": datasets}[what](
            words[0], int(words[1])
        )
