"""The configuration: one frozen tree of settings, each with its unit, checked once. Opens no store, imports no torch.

*What is computed* (`data`, `model`, `train`, `evaluation`) enters recipes; *how it runs* (`resources`, `store_url`)
never does. Secrets and endpoints are environment, never configuration.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from storage import keys
from storage.datasets.recipe import DatasetSettings, DatasetSpec
from storage.sources.filters import Filter, parse

Positive = Annotated[int, Field(ge=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def _form(schema: dict[str, Any]) -> None:
    """Titles, and an order that survives: PostgreSQL's JSON forgets it, and Prefect's form goes by `position`."""
    for position, (name, field) in enumerate(schema["properties"].items()):
        field |= {"title": name.replace("_", " ").capitalize(), "position": position}


class Section(BaseModel):
    """A part of the configuration: frozen, and every unknown name is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True, json_schema_extra=_form
    )


class DataConfig(Section):
    """Which text becomes which shards."""

    dataset: str = Field("fineweb-edu-10b", description="The dataset's name in the store.")
    source: str = Field(
        "HuggingFaceFW/fineweb-edu",
        description="A Hub dataset, or a path, folder or glob of .parquet or .jsonl files, s3:// too.",
    )
    config: str = Field("sample-10BT", description="Configuration of a Hub dataset.")
    revision: str = Field("main", description="Revision of a Hub dataset: branch, tag or commit.")
    text_column: str = Field("text", description="The column that holds the documents.")
    shard_tokens: Positive = Field(10_000_000, description="Tokens in a full shard; 2 bytes each.")
    val_shards: Positive = Field(10, description="The first shards of the first version are the val split.")
    filters: tuple[str, ...] = Field(
        (), description="Which documents count, all of: 'int_score >= 4', 'length >= 200' (characters)."
    )
    max_tokens: int = Field(0, ge=0, description="Only the first documents, of so many tokens; 0: all.")
    mirror: bool = Field(True, description="Copy the files of a Hub dataset into the store first; else read ranges.")
    on_bad_document: Literal["fail", "skip"] = Field(
        "fail", description="A document that cannot be tokenised fails its shard, or is left out and counted."
    )

    @model_validator(mode="after")
    def _filters_can_be_read(self) -> Self:
        assert self.parsed_filters is not None  # raises what is wrong
        return self

    def spec(self, tokenizer: dict[str, Any]) -> DatasetSpec:
        """The dataset that this section describes, tokenised by the tokenizer of that identity."""
        settings = DatasetSettings(
            shard_tokens=self.shard_tokens,
            tokenizer=tokenizer["sha256"],
            text_column=self.text_column,
            filters=tuple(str(condition) for condition in self.parsed_filters),
            on_bad_document=self.on_bad_document,
            max_tokens=self.max_tokens,
        )
        return DatasetSpec(self.dataset, settings, self.source, self.config, self.val_shards, tokenizer)

    @property
    def parsed_filters(self) -> tuple[Filter, ...]:
        """The filters, read."""
        return tuple(parse(text) for text in self.filters)


class ModelConfig(Section):
    """The shape of GPT-2; the defaults are the 124M model's."""

    layers: Positive = Field(12, description="Transformer blocks.")
    heads: Positive = Field(12, description="Attention heads a block; must divide the width.")
    width: Positive = Field(768, description="Channels of the residual stream.")
    context_tokens: Positive = Field(1_024, description="Longest sequence, in tokens: learnt positions.")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(
                f"model.width = {self.width} cannot be divided among model.heads = {self.heads} heads. "
                f"Try a width of {self.width // self.heads * self.heads or self.heads}."
            )
        return self


class TrainingConfig(Section):
    """The optimizer, the schedule and what a step is; the defaults are the 19,073-step run of GPT-2 124M."""

    # How a training runs, not what it computes: never in a recipe, free to differ when a run goes on. (With dropout
    # another micro-batch drops other activations, of the same distribution.)
    HOW: ClassVar = frozenset(
        {"micro_batch_sequences", "compile", "checkpoint_every_steps", "keep_last", "keep_every_steps"}
    )

    sequence_tokens: Positive = Field(512, description="T: tokens of one sequence.")
    micro_batch_sequences: Positive = Field(8, description="Sequences in one forward pass on one rank.")
    batch_tokens: Positive = Field(524_288, description="Tokens of one step, over all ranks.")
    max_steps: Positive = Field(19_073, description="Optimizer steps of the whole run.")
    warmup_steps: int = Field(715, ge=0, description="Steps in which the learning rate rises to its maximum.")
    learning_rate: float = Field(6e-4, gt=0, description="Maximum learning rate.")
    min_learning_rate: float = Field(6e-5, ge=0, description="Learning rate at the end of the cosine.")
    weight_decay: float = Field(0.1, ge=0, description="Decay of matrices; vectors have none.")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW's two decay rates.")
    clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    skip_outlier_steps: int = Field(
        0, ge=0, description="Steps without an update that are allowed, where loss or gradient is far off or no number."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of activations dropped in training.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Arithmetic of the forward pass; auto: bf16 where a GPU has it, else fp32."
    )
    compile: Literal["auto", "on", "off"] = Field("auto", description="torch.compile; auto: on with CUDA only.")
    seed: int = Field(1337, ge=0, description="Decides the initial weights and the order of the data.")
    start_from: str = Field("", description="A run whose newest checkpoint this one begins with; empty: from scratch.")
    start_with: Literal["weights", "everything"] = Field(
        "weights", description="What is taken of it: its weights, or its step and its optimizer's state too."
    )
    checkpoint_every_steps: Positive = Field(250, description="Steps between checkpoints.")
    keep_last: Positive = Field(3, description="How many of the newest checkpoints are kept.")
    keep_every_steps: int = Field(5_000, ge=0, description="Checkpoints kept for good; 0: none but the newest.")
    validate_every_steps: int = Field(250, ge=0, description="Steps between validations inside the run; 0: none.")
    validation_tokens: Positive = Field(10_485_760, description="Tokens of a validation inside the run, at most.")

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        micro_batch_tokens = self.sequence_tokens * self.micro_batch_sequences
        if self.batch_tokens % micro_batch_tokens:
            nearest = max(round(self.batch_tokens / micro_batch_tokens), 1) * micro_batch_tokens
            raise ValueError(
                f"train.batch_tokens = {self.batch_tokens:,} cannot be made of whole micro-batches of "
                f"{micro_batch_tokens:,} tokens (train.micro_batch_sequences {self.micro_batch_sequences} x "
                f"train.sequence_tokens {self.sequence_tokens:,}). Try train.batch_tokens = {nearest}."
            )
        if self.warmup_steps > self.max_steps:
            raise ValueError(
                f"train.warmup_steps = {self.warmup_steps:,} is more than train.max_steps = {self.max_steps:,}. "
                f"Try train.warmup_steps = {self.max_steps // 10}."
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"train.min_learning_rate = {self.min_learning_rate} is more than train.learning_rate = "
                f"{self.learning_rate}. Try train.min_learning_rate = {self.learning_rate / 10:g}."
            )
        return self

    def micro_batches(self, ranks: int) -> int:
        """Micro-batches of one step on each of `ranks` ranks. Raises ValueError when the batch cannot be shared out."""
        micro_batch_tokens = self.sequence_tokens * self.micro_batch_sequences
        count, rest = divmod(self.batch_tokens, micro_batch_tokens * ranks)
        if rest:
            raise ValueError(
                f"train.batch_tokens = {self.batch_tokens:,} cannot be shared among {ranks} ranks in micro-batches of "
                f"{micro_batch_tokens:,} tokens. Try train.batch_tokens = {(count + 1) * micro_batch_tokens * ranks}, "
                f"or resources.processes = 1."
            )
        return count

    @property
    def batch_windows(self) -> int:
        """Windows of T tokens in one step, over all ranks."""
        return self.batch_tokens // self.sequence_tokens


class EvaluationConfig(Section):
    """What is asked of a trained model: free to differ each time, every evaluation holds what it was asked."""

    checkpoint: str = Field(
        "last",
        pattern="^(last|every|[0-9]+)$",
        description="Which checkpoint is evaluated: the last one, every one that is kept, or that of a step.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Arithmetic of losses; bf16 is faster on a GPU and moves a few answers. Samples: fp32."
    )
    validation_tokens: int = Field(0, ge=0, description="Tokens of the val split that are scored; 0: all of them.")
    hellaswag: str = Field(
        "Rowan/hellaswag",
        description="A Hub dataset or a file of HellaSwag items; empty: a completion set of val documents.",
    )
    completion_items: Positive = Field(
        200, description="Items of the completion set, where no HellaSwag file is given."
    )
    prompts: tuple[str, ...] = Field(("Hello, I'm a language model,",), description="Beginnings of the samples.")
    samples: Positive = Field(2, description="Samples of each prompt.")
    sample_tokens: Positive = Field(64, description="New tokens of a sample.")
    temperature: float = Field(0.9, ge=0, description="0: always the likeliest token; higher: more surprising.")
    top_k: int = Field(50, ge=0, description="Only the k likeliest tokens are drawn from; 0: all.")
    top_p: float = Field(1.0, gt=0, le=1, description="Only the likeliest tokens of this total probability; 1: all.")


class ResourcesConfig(Section):
    """How it runs: never part of a recipe, free to differ from one run of a command to the next."""

    runner: Literal["threads", "processes", "dask"] = Field("threads", description="What runs shard jobs in parallel.")
    workers: int = Field(0, ge=0, description="Shard jobs at once; 0: one a core.")
    dask_address: str = Field("", description="A standing Dask cluster, tcp://host:port; empty: one on this host.")
    shards_per_task: int = Field(0, ge=0, description="Shards that one task makes; 0: one, more in plans above 2,000.")
    audit: bool = Field(False, description="Look for leaks (gpt2 dataset audit) after each build.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto: CUDA, else MPS, else the CPU.")
    processes: int = Field(0, ge=0, description="Training processes on each host; 0: one a GPU, else 1.")
    nodes: Positive = Field(1, description="Hosts that train together; each runs the command that is printed.")
    rendezvous: str = Field("", description="HOST:PORT of the first of several hosts, where they find each other.")
    prefetch_batches: int = Field(4, ge=0, description="Micro-batches that are made ready ahead; 0: none.")
    unsaved_minutes: float = Field(
        30.0, gt=0, description="How long a training goes on while no checkpoint can be stored."
    )
    tensorboard: str = Field("", description="A folder for TensorBoard's event files (extra: tensorboard).")
    concurrent_evaluations: Positive = Field(1, description="Evaluations at once.")
    evaluation_processes: int = Field(1, ge=0, description="Processes of one evaluation; 0: one a GPU, else 1.")
    cache_bytes: Positive = Field(50_000_000_000, description="Shards of an S3 store that this host keeps, in bytes.")


class RunConfig(Section):
    """Everything a run is asked to be."""

    name: str = Field("gpt2-124m", description="The run's name in the store.")
    store_url: str = Field(
        "./data", description="The store: a folder, or s3://bucket/prefix (endpoint, secrets: AWS_*)."
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        keys.check_name("name", self.name)
        keys.check_name("data.dataset", self.data.dataset)
        if self.train.sequence_tokens > self.model.context_tokens:
            raise ValueError(
                f"train.sequence_tokens = {self.train.sequence_tokens:,} is more than model.context_tokens = "
                f"{self.model.context_tokens:,}. Try train.sequence_tokens = {self.model.context_tokens}."
            )
        if self.resources.processes:
            self.train.micro_batches(self.resources.processes * self.resources.nodes)
        if self.resources.nodes > 1 and not self.resources.rendezvous:
            raise ValueError(
                f"resources.nodes = {self.resources.nodes}: the hosts must know where to find each other. Give the "
                f"first one's address: --set resources.rendezvous=HOST:29500"
            )
        if self.train.start_from:
            keys.check_name("train.start_from", self.train.start_from)
        return self

    def computed(self) -> dict[str, Any]:
        """What is computed, as JSON values. A run is pinned to all of it but `evaluation`."""
        return self.model_dump(mode="json", include={"data", "model", "train", "evaluation"})

    def how(self) -> dict[str, Any]:
        """How it runs, as JSON values: what a process is told beside its recipe."""
        return self.model_dump(mode="json", include={"train": set(TrainingConfig.HOW), "resources": True})


def differences(asked: dict[str, Any], pinned: dict[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two configurations of the same shape differ, in words."""
    found = []
    for name, ours in asked.items():
        theirs = pinned[name]
        if isinstance(ours, dict) and isinstance(theirs, dict):
            found += differences(ours, theirs, f"{prefix}{name}.")
        elif ours != theirs:
            found.append(f"{prefix}{name} is {theirs!r}, asked for {ours!r}")
    return sorted(found)
