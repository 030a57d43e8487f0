"""Export and import keep every weight, transformers computes the same logits, and only a GPT-2 is imported."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Model

from model import tokenizer
from model.__main__ import run_job
from model.checkpoints.huggingface import export_run, import_folder, tensor_shapes
from model.checkpoints.records import WEIGHTS, checkpoints, chosen
from model.checkpoints.weights import load_model
from model.config import ModelConfig
from model.gpt import GPT
from model.runs.run import Start, find_run
from storage.errors import CheckpointInvalid, ObjectMissing, StoreUnusable
from storage.keys import RunKeys
from storage.loading.windows import Windows
from storage.stores.store import Store
from tests.damage import flip_bit
from tests.model.training_runs import SHORT, STEPS, StoredDataset, losses, modification_times

SHAPE = ModelConfig(layers=1, heads=2, width=16, context_tokens=32)  # the shape of `StoredDataset`'s runs
C_ATTN, WTE, LN = "transformer.h.0.attn.c_attn.weight", "transformer.wte.weight", "transformer.h.0.ln_1.bias"
TEXTS = (
    "Hello, I'm a language model,",
    "  two spaces, a tab\tand lines\n\n\n   end  ",
    "naïve café — 日本語 🙂 e\u0301 \u00a0x",
    "def f(x):\n    return x ** 2  # 1234567 don't I'LL we've",
    "",
)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that transformers saved, with no weight at its initial value."""
    folder = tmp_path_factory.mktemp("published") / "gpt2"
    torch.manual_seed(4)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def altered(published: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies the published model with other settings ("removed" deletes one) and tensors (None deletes one)."""

    def alter(settings: dict[str, Any], tensors: dict[str, np.ndarray | None] | None = None) -> Path:
        folder = Path(shutil.copytree(published, tmp_path / "altered"))
        changed = json.loads((folder / "config.json").read_text()) | settings
        remaining = {name: value for name, value in changed.items() if value != "removed"}
        (folder / "config.json").write_text(json.dumps(remaining))
        if tensors is not None:
            weights = load_file(folder / WEIGHTS) | tensors
            save_file({name: weight for name, weight in weights.items() if weight is not None}, folder / WEIGHTS)
        return folder

    return alter


def ids() -> Tensor:
    return torch.randint(tokenizer.VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(8))


@torch.no_grad()
def our_logits(store: Store, run: str) -> Tensor:
    model: GPT = load_model(store, run, chosen(store, run)[0]).eval()
    return model.logits(model.transformer(ids()))


@torch.no_grad()
def their_logits(folder: Path) -> Tensor:
    logits: Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids()).logits
    return logits


# Export


def test_transformers_opens_an_exported_run_and_computes_the_same_logits(
    dataset: StoredDataset, tmp_path: Path
) -> None:
    run = dataset.train("to-export", *SHORT, "train.dropout=0.1")
    before = modification_times(dataset.store)
    record = export_run(dataset.store, run, tmp_path / "new" / "folder")
    assert (record.step, modification_times(dataset.store)) == (STEPS, before)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "folder")
    assert (type(model), model.dtype, model.config.resid_pdrop) == (GPT2LMHeadModel, torch.float32, 0.1)
    with safe_open(tmp_path / "new" / "folder" / WEIGHTS, "np") as weights:
        assert weights.metadata() == {"format": "pt"}  # transformers 4 requires it
    assert model.lm_head.weight is model.transformer.wte.weight
    ours = our_logits(dataset.store, run)
    torch.testing.assert_close(their_logits(tmp_path / "new" / "folder"), ours, rtol=0, atol=1e-4)
    assert ours.max() > 1  # the model was trained
    assert model.generate(ids()[:1, :4], max_new_tokens=6, do_sample=False).shape == (1, 10)


def test_the_exported_tokenizer_encodes_as_ours(dataset: StoredDataset, published: Path, tmp_path: Path) -> None:
    import_folder(dataset.store, "tokenizer", published)
    export_run(dataset.store, "tokenizer", tmp_path / "folder")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "folder")
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist()
        assert theirs.decode(tokenizer.encode(text).tolist()) == text
    assert (len(theirs), theirs.eos_token_id, theirs.bos_token_id) == (50_257, tokenizer.EOT, tokenizer.EOT)
    assert theirs.model_max_length == 32


def test_all_exported_files_have_the_same_permissions(dataset: StoredDataset, published: Path, tmp_path: Path) -> None:
    import_folder(dataset.store, "readable", published)
    export_run(dataset.store, "readable", tmp_path / "folder")
    assert len({path.stat().st_mode for path in (tmp_path / "folder").iterdir()}) == 1


def test_a_folder_that_is_not_empty_is_left_untouched(dataset: StoredDataset, published: Path, tmp_path: Path) -> None:
    import_folder(dataset.store, "not-twice", published)
    (tmp_path / "empty").mkdir()
    export_run(dataset.store, "not-twice", tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for name in ("empty", "file"):
        with pytest.raises(StoreUnusable, match=rf"export.*{name}.*not an empty folder.*Give"):
            export_run(dataset.store, "not-twice", tmp_path / name)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("fails", ["fsync", "copymode"])
def test_a_failed_export_leaves_no_file(
    dataset: StoredDataset, published: Path, tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    run = f"full-{fails}"
    import_folder(dataset.store, run, published)
    monkeypatch.setattr(os if fails == "fsync" else shutil, fails, full)
    with pytest.raises(StoreUnusable, match=r"export [\d,]+ bytes.*No space left.*another folder"):
        export_run(dataset.store, run, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_checkpoint_or_with_a_damaged_one_is_not_exported(
    dataset: StoredDataset, published: Path, tmp_path: Path
) -> None:
    with pytest.raises(ObjectMissing, match=r"'none-such'.*gpt2 train"):
        export_run(dataset.store, "none-such", tmp_path / "folder")
    record = import_folder(dataset.store, "to-damage", published)
    sums = flip_bit(dataset.store, RunKeys("to-damage").checkpoint_file(0, record.attempt, WEIGHTS))
    with pytest.raises(CheckpointInvalid, match=rf"{sums[0]}, found {sums[1]}.*Delete"):
        export_run(dataset.store, "to-damage", tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


# Import


@pytest.mark.parametrize("form", ["GPT2LMHeadModel", "GPT2Model", "shards", "float16", "bfloat16", "older"])
def test_models_saved_by_transformers_are_imported_and_compute_the_same_logits(
    dataset: StoredDataset, published: Path, form: str, tmp_path: Path
) -> None:
    folder = tmp_path / form
    kind = GPT2Model if form == "GPT2Model" else GPT2LMHeadModel
    dtype = getattr(torch, form) if "float" in form else torch.float32
    shard_size = "1MB" if form == "shards" else "5GB"
    kind.from_pretrained(published, dtype=dtype).save_pretrained(folder, max_shard_size=shard_size)
    if form == "older":  # like the first conversions of OpenAI's files
        weights = {name.removeprefix("transformer."): tensor for name, tensor in load_torch(folder / WEIGHTS).items()}
        mask = {"h.0.attn.bias": torch.ones(1, 1, 32, 32).tril().bool(), "h.0.attn.masked_bias": torch.tensor(-1e4)}
        save_torch(weights | mask | {"lm_head.weight": weights["wte.weight"].clone()}, folder / WEIGHTS)
        (folder / "config.json").write_text(
            json.dumps({"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32})
        )
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (form == "shards")
    record = import_folder(dataset.store, f"from-{form}", folder)
    assert (record.step, record.job, record.model) == (0, "import", SHAPE.model_dump())
    assert checkpoints(dataset.store, f"from-{form}") == [record]
    torch.testing.assert_close(our_logits(dataset.store, f"from-{form}"), their_logits(folder), rtol=0, atol=1e-4)


def test_weights_saved_by_torch_are_imported(dataset: StoredDataset, published: Path, tmp_path: Path) -> None:
    """Shards without an index, names of wrappers, and the tied weight under the name that save_model keeps."""
    weights = load_torch(published / WEIGHTS)
    weights["lm_head.weight"] = weights.pop(WTE)
    wrapped = {"module._orig_mod." + name.replace("h.0.", "h.0._orig_mod."): weight for name, weight in weights.items()}
    folder = Path(shutil.copytree(published, tmp_path / "wrapped"))
    (folder / WEIGHTS).unlink()
    for shard, first in enumerate((0, 5), 1):
        names = sorted(wrapped)[first : first + 5] if shard == 1 else sorted(wrapped)[first:]
        save_torch({name: wrapped[name] for name in names}, folder / f"model-{shard:05}-of-00002.safetensors")
    import_folder(dataset.store, "wrapped", folder)
    import_folder(dataset.store, "unwrapped", published)
    ours, theirs = (checkpoints(dataset.store, run)[0].files for run in ("wrapped", "unwrapped"))
    assert ours == theirs


def test_a_round_trip_gives_the_same_bytes(dataset: StoredDataset, published: Path, tmp_path: Path) -> None:
    import_folder(dataset.store, "imported", published)
    export_run(dataset.store, "imported", tmp_path / "imported")
    import_folder(dataset.store, "imported-twice", tmp_path / "imported")
    export_run(dataset.store, "imported-twice", tmp_path / "imported-twice")
    for path in (tmp_path / "imported").iterdir():
        assert path.read_bytes() == (tmp_path / "imported-twice" / path.name).read_bytes(), path.name
    original, exported = load_file(published / WEIGHTS), load_file(tmp_path / "imported-twice" / WEIGHTS)
    assert original.keys() == exported.keys()
    assert all(np.array_equal(original[name], exported[name]) for name in original)


def test_a_training_starts_from_an_imported_model(dataset: StoredDataset, published: Path) -> None:
    record = import_folder(dataset.store, "pretrained", published)
    key = dataset.put_job("tuned", *SHORT, "train.start_from=pretrained")
    assert find_run(dataset.store, "tuned").start == Start("pretrained", 0, record.attempt)
    assert run_job(dataset.store.url, key) == 0
    loader = Windows(dataset.store, "small", dataset.manifest, "train", sequence_tokens=32, seed=1337)
    first_BT = torch.from_numpy(loader.read(0, 2).astype(np.int64))
    with torch.no_grad():
        logits_BTV = AutoModelForCausalLM.from_pretrained(published)(first_BT[:, :-1]).logits
        model = load_model(dataset.store, "pretrained", record).eval()
        ours = model(first_BT[:, :-1], first_BT[:, 1:]).item() / 64
    theirs = F.cross_entropy(logits_BTV.flatten(0, 1), first_BT[:, 1:].flatten()).item()
    trained = losses(dataset.store, "tuned")
    assert trained[0] == pytest.approx(ours, rel=1e-6, abs=0) == pytest.approx(theirs, rel=1e-5, abs=0)
    assert len(trained) == STEPS
    assert trained[-1] < trained[0]


def test_an_imported_run_cannot_be_resumed_and_names_the_setting_that_starts_from_it(
    dataset: StoredDataset, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_folder(dataset.store, "weights-alone", published)
    assert run_job(dataset.store.url, dataset.put_job("weights-alone", *SHORT)) == 2
    assert "train.start_from=weights-alone" in capsys.readouterr().err


def test_tensor_shapes_equal_those_of_transformers() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_head=4, n_embd=48, n_positions=20))
    shape = ModelConfig(layers=3, heads=4, width=48, context_tokens=20)
    assert tensor_shapes(shape) == {name: tuple(weight.shape) for name, weight in model.named_parameters()}


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "gpt_neo"}, "'gpt2'.*'gpt_neo'"),
        ({"model_type": "removed"}, "'gpt2'.*None"),
        ({"vocab_size": 50_304}, "50257.*50304.*resize_token_embeddings"),
        ({"vocab_size": 50_000}, "50257.*50000"),
        ({"activation_function": "gelu"}, "'gelu_new'.*'gelu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings True.*False"),
        ({"layer_norm_epsilon": 1e-6}, "1e-05.*1e-06"),
        ({"scale_attn_weights": False}, "scale_attn_weights True.*False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx False.*True"),
        ({"add_cross_attention": True}, "add_cross_attention False.*True"),
        ({"n_inner": 32}, "n_inner None.*32"),
        ({"n_head": 3}, "n_head 3, n_embd 16"),
        ({"n_layer": "many"}, "n_layer 'many'"),
        ({"n_layer": 2}, r"transformer\.h\.1.*no such tensor"),
        ({"n_positions": 64}, r"wpe.*\(64, 16\), found .*\(32, 16\)"),
    ],
)
def test_settings_that_gpt2_does_not_have_are_refused(
    altered: Callable[..., Path], store: Store, settings: dict[str, Any], message: str
) -> None:
    assert_refused(store, altered(settings), message)


@pytest.mark.parametrize("settings", [{"activation_function": "gelu_pytorch_tanh"}, {"n_inner": 64}, {"n_ctx": 7}])
def test_equivalent_settings_are_accepted(altered: Callable[..., Path], store: Store, settings: dict[str, Any]) -> None:
    assert import_folder(store, "same", altered(settings)).model == SHAPE.model_dump()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({C_ATTN: None}, f"{C_ATTN}.*no such tensor"),
        ({C_ATTN: np.zeros((48, 16), "f4")}, rf"{C_ATTN}.*\(16, 48\), found .*\(48, 16\)"),
        ({WTE: np.zeros((50_304, 16), "f4")}, rf"{WTE}.*\(50257, 16\), found .*\(50304, 16\)"),
        ({LN: np.full(16, np.nan, "f4")}, f"finite.*{LN}, found nan"),
        ({LN: np.full(16, -np.inf, "f4")}, f"finite.*{LN}, found -inf"),
        ({LN: np.zeros(16, "f8")}, f"{LN} in F32, F16, BF16, found F64"),
        ({"lm_head.weight": np.zeros((50_257, 16), "f4")}, "lm_head.weight.*token embedding.*tied"),
        ({"transformer.h.0.crossattention.c_attn.bias": np.zeros(32, "f4")}, r"no tensor .*crossattention.*\(32,\)"),
    ],
)
def test_tensors_that_gpt2_does_not_have_are_refused(
    altered: Callable[..., Path], store: Store, tensors: dict[str, np.ndarray | None], message: str
) -> None:
    assert_refused(store, altered({}, tensors), message)


@pytest.mark.parametrize("settings", [{"n_layer": 10**6}, {"n_layer": 10**4_000}, {"n_positions": 10**12}])
def test_a_shape_beyond_the_weights_is_refused_at_once(
    altered: Callable[..., Path], store: Store, settings: dict[str, Any]
) -> None:
    started = time.monotonic()
    assert_refused(store, altered(settings), r"config\.json.*found ")
    assert time.monotonic() - started < 5  # 0.1 s alone; a million layers took minutes


def test_weights_beyond_the_shape_are_not_read(altered: Callable[..., Path], store: Store) -> None:
    folder = altered({})
    with (folder / WEIGHTS).open("ab") as file:
        file.truncate(1 << 40)  # a sparse file
    assert_refused(store, folder, "1,099,511,627,776 bytes")


def test_a_tensor_in_two_shards_is_refused(altered: Callable[..., Path], store: Store) -> None:
    folder = altered({})
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    save_file({C_ATTN: np.zeros((16, 48), "f4")}, folder / "model-00002-of-00002.safetensors")
    assert_refused(store, folder, "each tensor once, found a tensor twice")


def test_unreadable_files_are_refused(altered: Callable[..., Path], store: Store, tmp_path: Path) -> None:
    folder = altered({})
    weights, settings = folder / WEIGHTS, folder / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert_refused(store, folder, "safetensors in model.safetensors")
    weights.unlink()
    assert_refused(store, folder, "model.safetensors, found no such file")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert_refused(store, folder, r"pytorch_model\.bin, a pickle.*save_pretrained")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {WTE: "model-00001-of-00002.safetensors"}}))
    assert_refused(store, folder, "model-00001-of-00002.safetensors, found .*No such file")
    (tmp_path / "model.safetensors").write_bytes(whole)
    index.write_text(json.dumps({"weight_map": {WTE: "../model.safetensors"}}))  # an index cannot leave the folder
    assert_refused(store, folder, "No such file")
    for body in (b"[]", b"{", b"\xff"):
        settings.write_bytes(body)
        assert_refused(store, folder, r"a JSON object in config\.json")
    os.truncate(settings, 1 << 40)  # a sparse file, which no memory holds
    assert_refused(store, folder, r"a JSON object in config\.json")
    settings.unlink()
    assert_refused(store, folder, r"config\.json, found .*No such file")
    assert_refused(store, tmp_path / "none-such", "No such file")


def test_an_existing_run_is_not_overwritten(dataset: StoredDataset, published: Path) -> None:
    import_folder(dataset.store, "taken", published)
    dataset.put_job("pinned-only")
    before = modification_times(dataset.store)
    for run in ("taken", "pinned-only"):
        with pytest.raises(ValueError, match=rf"'{run}' already exists.*another name"):
            import_folder(dataset.store, run, published)
    assert modification_times(dataset.store) == before


def test_the_same_folder_is_imported_only_once(
    dataset: StoredDataset, published: Path, altered: Callable[..., Path]
) -> None:
    import_folder(dataset.store, "ensured", published, again=True)
    trained = dataset.train("trained-not-imported", *SHORT)
    before = modification_times(dataset.store)
    import_folder(dataset.store, "ensured", published, again=True)
    for run, folder in (("ensured", altered({}, {LN: np.ones(16, "f4")})), (trained, published)):
        with pytest.raises(ValueError, match=rf"'{run}' holds another model.*another name"):
            import_folder(dataset.store, run, folder, again=True)
    assert modification_times(dataset.store) == before


def assert_refused(store: Store, folder: Path, message: str) -> None:
    """The error names what was expected, what was found and a remedy, and nothing is stored."""
    before = modification_times(store)
    with pytest.raises(ValueError, match=message) as caught:
        import_folder(store, "refused", folder)
    assert re.fullmatch(r"cannot import .*: expected .*, found .*\. [A-Z].*", str(caught.value), re.DOTALL)
    assert modification_times(store) == before
