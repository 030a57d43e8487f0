"""The configuration: frozen pydantic models, one field per setting, validated once. Opens no store, imports no torch.

*What is computed* (`data`, `model`, `train`, `evaluation`) enters recipes; *how it runs* (`resources`, `store_url`)
never does. Secrets and endpoints are environment variables.
"""

from dataclasses import fields
from importlib.util import find_spec
from operator import not_
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator

from storage import keys
from storage.datasets.recipe import DatasetSettings, DatasetSpec, TokenizerIdentity
from storage.loading.mix import parse_mix
from storage.sources.filters import parse
from storage.stores.opening import CREDENTIALS

# Bounds, also of Prefect's form: with an integer of over 64 bits or a lone surrogate in the parameters of one run, its
# server answers every list of runs with status 500. A form's JavaScript holds integers up to 2**53 - 1 exactly.
Count = Annotated[int, Field(strict=True, ge=0, le=2**53 - 1)]
Positive = Annotated[int, Field(strict=True, ge=1, le=2**53 - 1)]
Seed = Annotated[int, Field(strict=True, ge=0, le=2**32 - 1)]  # PyTorch's generator ignores higher bits on a CPU
Amount = Annotated[float, Field(strict=True, ge=0, le=1e15)]
Fraction = Annotated[float, Field(strict=True, ge=0, lt=1)]
CHECKPOINT = "^(last|best|every|[0-9]{1,16})$"
ADDRESS = r"^([\w.:\[\]-]{1,253}:[0-9]{1,5})?$"
NAME = rf"^({keys.NAME.pattern})?(?!\n)$"
TEXT = rf"^(?![\s\S]*{CREDENTIALS.pattern})[^\0\ud800-\udfff]*$"
TRACKER = rf"^(?![\s\S]*{CREDENTIALS.pattern})((trackio|wandb|mlflow|tensorboard)(:[^\0\ud800-\udfff]+)?)?(?!\n)$"
Name = Annotated[str, Field(max_length=200, pattern=NAME)]
Text = Annotated[str, Field(max_length=4_096, pattern=TEXT)]
Tracker = Annotated[str, Field(max_length=4_096, pattern=TRACKER)]
Url = Annotated[str, Field(max_length=4_096, json_schema_extra={"pattern": TEXT})]  # `open_store` refuses credentials
LINE = r"^[^\0\ud800-\udfff]*$"
Line = Annotated[str, Field(max_length=4_096, pattern=LINE)]
Lines = Annotated[tuple[Line, ...], Field(max_length=100)]
Condition = Annotated[Line, AfterValidator(lambda text: parse(text) and text)]  # `parse` raises ValueError


def _form(schema: dict[str, Any]) -> None:
    """Add a title and a `position` to each field: Prefect's form sorts by it, because PostgreSQL loses the order."""
    for position, (name, field) in enumerate(schema["properties"].items()):
        field |= {"title": name.replace("_", " ").capitalize(), "position": position}


class Section(
    BaseModel, frozen=True, extra="forbid", allow_inf_nan=False, json_schema_extra=_form, regex_engine="python-re"
):
    """A part of the configuration. Frozen; an unknown field is an error."""


class DataConfig(Section):
    """The source text, and how it is cut into shards."""

    dataset: Name = Field("fineweb-edu-10b", min_length=1, description="Name of the dataset in the store.")
    source: Text = Field(
        "HuggingFaceFW/fineweb-edu",
        min_length=1,  # or it would be the working folder
        description="Hugging Face dataset (owner/name), or path or s3:// URL of a file, folder or glob (quote it): "
        "parquet, arrow, jsonl, json, csv, tsv, txt or md; also .gz, .zst, .bz2, .xz.",
    )
    config: Text = Field("sample-10BT", description="Hub configuration: a name (empty = default), glob or newest:N.")
    revision: Text = Field("main", description="Branch, tag or commit of the Hugging Face dataset.")
    text_column: Text = Field("text", description="Column with the text; doc.text is field text of column doc.")
    shard_tokens: Positive = Field(10_000_000, description="Maximum tokens per shard (a file, 2 bytes per token).")
    val_shards: Positive = Field(10, description="Shards in the validation split.")
    filters: Annotated[tuple[Condition, ...], Field(max_length=100)] = Field(
        (),
        description="Keep documents that meet all conditions, e.g. 'meta.score >= 4', 'length >= 200' (characters). "
        "Partition folders such as lang=en/ are columns, too.",
    )
    max_tokens: Count = Field(0, description="Use only the first N tokens of the source (0 = all).")
    mirror: bool = Field(True, description="Copy Hugging Face files into the store (false = read them remotely).")
    on_bad_document: Literal["fail", "skip"] = Field(
        "fail", description="If a document cannot be tokenised: fail the shard, or skip and count the document."
    )
    keep_val_duplicates: bool = Field(False, description="Keep val duplicates in train, to match published tokens.")
    val_choice: Literal["first", "spread"] = Field(
        "first", description="Take val shards from the start of the source, or spread over it (for sorted sources)."
    )

    def spec(self, tokenizer: TokenizerIdentity) -> DatasetSpec:
        """The dataset that this section describes, tokenised with this tokenizer."""
        same_names = self.model_dump(include={field.name for field in fields(DatasetSettings)})
        changed = {"tokenizer": tokenizer["sha256"], "filters": tuple(str(parse(text)) for text in self.filters)}
        settings = DatasetSettings(**same_names | changed)
        return DatasetSpec(self.dataset, settings, self.source, self.config, self.val_shards, tokenizer)


class ModelConfig(Section):
    """The shape of the model. The defaults are GPT-2 124M."""

    layers: Annotated[int, Field(strict=True, ge=1, le=1_000)] = Field(12, description="Number of transformer blocks.")
    heads: Positive = Field(12, description="Attention heads in each block; must divide the width.")
    width: Positive = Field(768, description="Channels of the residual stream (embedding size).")
    context_tokens: Positive = Field(1_024, description="Longest sequence in tokens (size of the position embedding).")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            problem = f"model.width = {self.width} is not a multiple of model.heads = {self.heads}"
            raise ValueError(f"{problem}. Try a width of {self.width // self.heads * self.heads or self.heads}.")
        return self


class TrainingConfig(Section):
    """The optimizer, the schedule and the batch. The defaults train GPT-2 124M on 10 billion tokens."""

    # How training runs, not what it computes: never in a recipe, free to change when a run is resumed. (With dropout,
    # another micro-batch size drops other activations, from the same distribution.)
    HOW: ClassVar = {"micro_batch_sequences", "compile", "checkpoint_every_steps", "keep_last", "keep_every_steps",
                     "keep_best"}  # fmt: skip

    sequence_tokens: Positive = Field(512, description="Sequence length in tokens.")
    micro_batch_sequences: Count = Field(0, description="Sequences per micro-batch of each process (0 = automatic).")
    batch_tokens: Positive = Field(524_288, description="Tokens per optimizer step, over all processes.")
    max_steps: Positive = Field(19_073, description="Optimizer steps in the whole run.")
    warmup_steps: Count = Field(715, description="Steps of linear warm-up to the maximum learning rate.")
    learning_rate: Amount = Field(6e-4, gt=0, description="Maximum learning rate.")
    min_learning_rate: Amount = Field(6e-5, description="Learning rate at the end of the cosine decay.")
    weight_decay: Amount = Field(0.1, description="Weight decay of matrices; biases and norms have none.")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), description="AdamW's beta1 and beta2.")
    clip: Amount = Field(1.0, gt=0, description="Maximum gradient norm (gradient clipping).")
    skip_outlier_steps: Count = Field(0, description="Skip up to N steps (NaN, inf or 10x the usual gradient norm).")
    dropout: Fraction = Field(0.0, description="Dropout probability during training.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Precision of the forward pass (auto = bf16 on a CUDA GPU that supports it, else fp32)."
    )
    compile: Literal["auto", "on", "off"] = Field("auto", description="Use torch.compile (auto = only with CUDA).")
    seed: Seed = Field(1337, description="Random seed of initial weights, data order, dropout and evaluation.")
    mix: Lines = Field((), exclude_if=not_, description="Dataset mix: web:0.8, code:0.2 (empty = only data.dataset).")
    start_from: Name = Field("", description="Run to start from, at its newest checkpoint (empty = none).")
    start_with: Literal["weights", "everything"] = Field("weights", description="everything = also step and optimizer.")
    checkpoint_every_steps: Positive = Field(250, description="Steps between two checkpoints.")
    keep_last: Positive = Field(3, description="Number of most recent checkpoints to keep.")
    keep_every_steps: Count = Field(5_000, description="Steps between checkpoints kept permanently (0 = none).")
    keep_best: bool = Field(True, description="Keep the checkpoint with the lowest val loss, too.")
    validate_every_steps: Count = Field(250, description="Steps between validations during training (0 = none).")
    validation_tokens: Positive = Field(10_485_760, description="Maximum tokens per validation, of each dataset.")
    patience_validations: Count = Field(0, exclude_if=not_, description="Early stop: N validations without a new best.")

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        self.micro_batches(ranks=1)
        if self.warmup_steps > self.max_steps:
            problem = f"train.warmup_steps = {self.warmup_steps:,} is more than train.max_steps = {self.max_steps:,}"
            raise ValueError(f"{problem}. Try train.warmup_steps = {self.max_steps // 10}.")
        if self.patience_validations and not self.validate_every_steps:
            raise ValueError("train.patience_validations needs validations: set train.validate_every_steps above 0")
        if self.min_learning_rate > self.learning_rate:
            rates = f"{self.min_learning_rate} is more than train.learning_rate = {self.learning_rate}"
            remedy = f"Try train.min_learning_rate = {self.learning_rate / 10:g}."
            raise ValueError(f"train.min_learning_rate = {rates}. {remedy}")
        return self

    def micro_batches(self, ranks: int) -> int:
        """Micro-batches (if automatic: sequences) per step on each rank. Raises ValueError if they are not whole."""
        micro_batch_tokens = self.sequence_tokens * (self.micro_batch_sequences or 1)
        count, rest = divmod(self.batch_tokens, micro_batch_tokens * ranks)
        if rest:
            on_each_rank = f" on each of {ranks} ranks (resources.processes x resources.nodes)" if ranks > 1 else ""
            nearest = max(round(self.batch_tokens / (micro_batch_tokens * ranks)), 1) * micro_batch_tokens * ranks
            size = f"{self.micro_batch_sequences or 'at least 1'} x train.sequence_tokens {self.sequence_tokens:,}"
            parts = f"{micro_batch_tokens:,} tokens (train.micro_batch_sequences {size}){on_each_rank}"
            problem = f"train.batch_tokens = {self.batch_tokens:,} is not a whole number of micro-batches of {parts}"
            remedy = f"Try train.batch_tokens = {nearest}, or for an existing run fewer micro-batch sequences or ranks."
            raise ValueError(f"{problem}. {remedy}")
        return count

    @property
    def batch_windows(self) -> int:
        """Windows per step, over all ranks."""
        return self.batch_tokens // self.sequence_tokens


class EvaluationConfig(Section):
    """How to evaluate checkpoints. May change at any time: each evaluation records its own settings."""

    checkpoint: str = Field("last", pattern=CHECKPOINT, description="last, best (val loss), every (kept) or a step.")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Precision of losses; bf16 is faster on a GPU but changes a few results. Samples use fp32."
    )
    validation_tokens: Count = Field(0, description="Maximum tokens of the validation split to score (0 = all).")
    hellaswag: Text = Field("Rowan/hellaswag", description="HellaSwag's Hub dataset or file (empty = completion set).")
    completion_items: Positive = Field(200, description="Items of the completion set, made from val documents.")
    prompts: Lines = Field(("Hello, I'm a language model,",), description="Prompts to generate samples from.")
    samples: Annotated[int, Field(strict=True, ge=1, le=10_000)] = Field(2, description="Samples per prompt.")
    sample_tokens: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] = Field(64, description="Tokens per sample.")
    temperature: Amount = Field(0.9, description="Sampling temperature (0 = always the most likely token).")
    top_k: Count = Field(50, description="Sample from the k most likely tokens (0 = all).")
    top_p: float = Field(1.0, strict=True, gt=0, le=1, description="Nucleus sampling: probability to keep (1 = all).")


class ResourcesConfig(Section):
    """Where and how jobs run, not what they compute. May change at any time."""

    runner: Literal["threads", "processes", "dask"] = Field("threads", description="How to tokenise in parallel.")
    workers: Count = Field(0, description="Shards to tokenise at once (0 = one per core).")
    dask_address: Text = Field("", description="Dask scheduler, tcp://HOST:PORT (empty = start one on this host).")
    shards_per_task: Count = Field(0, description="Shards per Prefect task (0 = automatic: 1 for up to 2,000 shards).")
    audit: bool = Field(False, description="After each build, report leaks: duplicates and test text in train.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto = CUDA, else MPS, else CPU.")
    processes: Count = Field(0, description="Training processes per host (0 = one per GPU, else 1).")
    nodes: Positive = Field(1, description="Hosts that train together; the log shows the command for each other host.")
    rendezvous: str = Field("", pattern=ADDRESS, description="HOST:PORT of the first of several hosts.")
    prefetch_batches: Count = Field(4, description="Micro-batches to prefetch (0 = none).")
    unsaved_minutes: Amount = Field(30.0, gt=0, description="Minutes to keep training if no checkpoint can be saved.")
    tracker: Tracker = Field("", description="trackio, wandb, mlflow or tensorboard, or KIND:TARGET (empty = none).")
    concurrent_evaluations: Positive = Field(1, description="Maximum number of evaluations that run at once.")
    evaluation_processes: Count = Field(1, description="Processes per evaluation (0 = one per GPU, else 1).")
    price_per_gpu_hour: Amount = Field(0.0, description="Price per GPU-hour, for gpt2 plan (0 = unknown).")
    cache_bytes: Positive = Field(50_000_000_000, description="Maximum bytes of this host's cache of shards from S3.")

    @model_validator(mode="before")
    @classmethod
    def _tensorboard_is_a_tracker(cls, values: Any) -> Any:
        """Stored jobs and requests of earlier versions have the field `tensorboard`, a folder."""
        if isinstance(values, dict) and (folder := values.get("tensorboard")) is not None:
            values = {name: value for name, value in values.items() if name != "tensorboard"}
            return {"tracker": folder and f"tensorboard:{folder}"} | values
        return values


class How(Section):
    """How a job runs: the settings of `train` in TrainingConfig.HOW, and the resources. Never part of a recipe."""

    train: dict[str, bool | int | str] = {}
    resources: ResourcesConfig = ResourcesConfig()


class RunConfig(Section):
    """The whole configuration of a run."""

    name: Name = Field("gpt2-124m", min_length=1, description="Name of the run. A new experiment needs a new name.")
    store_url: Url = Field("./data", min_length=1, description="Folder, or s3://bucket/prefix (credentials: AWS_*).")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.train.mix and self.data.dataset not in parse_mix(self.train.mix):
            problem = f"train.mix does not name the run's own dataset, data.dataset = {self.data.dataset!r}"
            raise ValueError(f"{problem}. Add '{self.data.dataset}:WEIGHT', or set data.dataset to one of the mix.")
        tokens, context = self.train.sequence_tokens, self.model.context_tokens
        if tokens > context:
            problem = f"train.sequence_tokens = {tokens:,} is more than model.context_tokens = {context:,}"
            raise ValueError(f"{problem}. Try train.sequence_tokens = {context}.")
        if self.resources.processes:
            self.train.micro_batches(self.resources.processes * self.resources.nodes)
        if self.resources.nodes > 1 and not self.resources.rendezvous:
            nodes = f"resources.nodes = {self.resources.nodes}"
            raise ValueError(f"{nodes}: set the address of the first host: --set resources.rendezvous=HOST:29500")
        return self

    def computed(self) -> dict[str, Any]:
        """The sections that decide what is computed, as JSON values."""
        return self.model_dump(mode="json", include={"data", "model", "train", "evaluation"})

    def pinned(self) -> dict[str, dict[str, object]]:
        """The settings that a run is pinned to, as JSON values."""
        return self.model_dump(mode="json", include={"data", "model", "train"}, exclude={"train": TrainingConfig.HOW})

    def how(self) -> How:
        return How(train=self.train.model_dump(include=TrainingConfig.HOW), resources=self.resources)


def check_extra(extra: str, package: str) -> None:
    """Raise ValueError if the extra that a setting needs is not installed."""
    if find_spec(package) is None:
        raise ValueError(f"the package {package} is not installed. Install the extra: pip install -e '.[{extra}]'")


def differences(requested: object, pinned: object, name: str = "") -> list[str]:
    """One line per field that differs between two configurations, sorted; `name` is a section."""
    if isinstance(requested, dict) and isinstance(pinned, dict):
        pairs = {key: (requested.get(key), pinned.get(key)) for key in requested.keys() | pinned.keys()}
        return sorted(line for key, pair in pairs.items() for line in differences(*pair, f"{name}.{key}".lstrip(".")))
    return [] if requested == pinned else [f"{name} is {pinned!r}, not {requested!r}"]
