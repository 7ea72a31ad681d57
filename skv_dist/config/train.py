"""``train``, ``optimizer`` and ``eval``: the loop, the update and the measurements."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from skv_dist.config.section import Section

Beta = Annotated[float, Field(ge=0, lt=1)]
Retention = Annotated[float, Field(gt=0, le=1)]


class TrainConfig(Section):
    """The training loop: how long, in what batches, in which precision, and where its results go."""

    steps: int = Field(default=0, ge=0, examples=[200])
    """Number of optimizer steps of the whole run, those before a resume included. 0: as many as epochs asks for. One of
    the two must be given."""

    epochs: float | None = Field(default=None, gt=0)
    """How often the run reads its training sequences, in place of steps. They are those of all sources together,
    whatever their weights. The steps that follow stand in the run's own config.yaml. Not with data.streaming. null: see
    steps."""

    seed: int = Field(default=1234, ge=0, lt=2**63)
    """Source of all randomness: initial weights, order of samples, held-out part, route tables and dropout."""

    output_dir: str = Field(min_length=1, examples=["runs/tiny"])
    """Folder for everything that the run writes. That is config.yaml (this configuration, complete), metrics.jsonl,
    tensorboard and checkpoints. If it holds a run already, checkpoint.resume decides what happens. All processes must
    see this one folder, which one run at a time may use."""

    global_batch_size: int = Field(gt=0, examples=[32])
    """Number of sequences in an optimizer step, over all replicas. A multiple of micro_batch_size times the number of
    replicas."""

    micro_batch_size: int = Field(gt=0, examples=[16])
    """Number of sequences in one forward pass of a replica. They share one route table. A replica makes
    global_batch_size / (micro_batch_size * replicas) such passes a step. Evaluations read it too."""

    precision: Literal["fp32", "bf16"] = "bf16"
    """Number format of weights and activations. skv-convert exports in it unless told otherwise.

    - fp32: everything in float32.
    - bf16: weights and activations in bfloat16; the weights that the optimizer updates, its state, and the sums of
      gradients over micro-batches and replicas in float32."""

    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it in memory.

    - none: nothing.
    - selective: the parts of each layer that recompute_modules names.
    - full: each layer, of which only the input and borrowed K/V are kept."""

    recompute_modules: list[Literal["core_attn", "mlp"]] = ["core_attn"]
    """Which parts of a layer are computed again. Read where recompute is selective. core_attn is attention between the
    projections, mlp the whole MLP."""

    compile: bool = False
    """Whether torch.compile makes kernels of the layers, the loss and the update. Faster on a GPU after a slow first
    step. With parallel.tensor above 1 the matrix products of the layers stay as they are, and the update is compiled
    only where ZeRO shards nothing. model.attention_dropout does not go with it where recompute is selective and repeats
    core_attn."""

    freeze: list[str] = []
    """Patterns of the weights that stay as they are, such as "*.mlp.*" or "embedding.weight". They have no optimizer
    state. Compared with names as in "layers.17.self_attention.linear_qkv.weight", in which * stands for any part."""

    max_skipped_steps: int = Field(default=10, gt=0)
    """The run ends with an error when so many updates in a row were skipped. An update is skipped when the loss or the
    gradient norm is not finite, or the loss is a spike (spike_factor)."""

    spike_factor: float | None = Field(default=2.0, gt=1)
    """The update of a step is skipped when its loss exceeds this times the median of recent losses. null: no loss is
    too large, as long as it is finite. There is no judgement before spike_window losses were accepted."""

    spike_window: int = Field(default=100, gt=1)
    """Number of accepted losses that the median of spike_factor is taken over."""

    tensorboard: bool = True
    """Whether metrics are written to output_dir/tensorboard too. metrics.jsonl is always written."""

    wandb: str | None = Field(default=None, min_length=1)
    """Project of Weights & Biases that metrics are sent to as well. Needs the package wandb and a login, or
    WANDB_MODE=offline in the environment, which keeps them in output_dir/wandb. null: none."""

    progress: bool = True
    """Whether progress is shown on standard error: a bar on a terminal, elsewhere a line now and then."""


class OptimizerConfig(Section):
    """The update: AdamW, and the learning rate over the run."""

    lr: float = Field(gt=0, examples=[3.0e-3])
    """Peak learning rate, which is reached at the end of the warm-up."""

    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of Adam's running means: of the gradient, and of its square."""

    eps: float = Field(default=1e-8, gt=0)
    """Number added to the root of the mean square, by which an update is divided."""

    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay: each update takes this times the learning rate off a weight. On matrices and the
    embedding only, not on norms and biases. 0: none."""

    clip_grad_norm: float = Field(default=1.0, ge=0)
    """Largest norm of the gradient over all parameters. A longer gradient is scaled down to it. 0: no clipping."""

    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """How the learning rate goes on after the warm-up, until train.steps.

    - constant: it stays at lr.
    - cosine: half a cosine from lr to lr * min_lr_ratio.
    - linear: a straight line from lr to lr * min_lr_ratio.
    - wsd: warm-up, stable, decay: constant at lr, then a straight line to lr * min_lr_ratio over the last
      decay_fraction of the run."""

    warmup_steps: int | None = Field(default=None, ge=0)
    """Number of steps over which the learning rate rises to lr in a straight line. null: warmup_fraction of
    train.steps. 0: no warm-up."""

    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Part of train.steps that is warm-up. Read where warmup_steps is null."""

    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Part of train.steps over which the learning rate falls at the end. Read by schedule wsd."""

    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end of the run, relative to lr. Read by all schedules but constant."""


SCORES = ("exact_match", "token_f1")  # of answers; in percent, and better where higher


class QuestionsConfig(Section):
    """Questions with known answers, which a run answers at each evaluation and each size of the cache."""

    path: str = Field(min_length=1, examples=["questions.jsonl"])
    """File with a question in each row, JSONL or Parquet. It must hold no question that the run trains on."""

    prompt_field: str | None = None
    """As in data.sources: a field, or a text with the names of fields in braces. null: that of the first source with
    prompts."""

    answers_field: str | None = None
    """The field that holds the right answer, or a list of right answers. null: that of the response_field of the first
    source with prompts, where it is a single field."""

    chat: bool = False
    """Whether the prompt is a user's message, which the tokenizer's chat template renders."""

    number: int | None = Field(default=None, gt=0)
    """How many questions to answer, the first of the file. null: all."""

    new_tokens: int = Field(default=32, gt=0)
    """Largest number of tokens in an answer. It also ends at an end token or a line break."""

    batch_size: int = Field(default=16, gt=0)
    """Number of questions that a replica answers together."""


class EvalConfig(Section):
    """Evaluations during the run: the loss on held-out text at several sizes of the cache. skv-eval reads samples and
    retention too, as its defaults."""

    every: int = Field(default=500, ge=0)
    """Number of steps between evaluations. There is one after the last step as well. 0: no evaluations. Anything else
    needs data.validation_sources or data.validation_fraction above 0."""

    samples: int = Field(default=64, gt=0)
    """Number of validation sequences. Every evaluation takes the same ones."""

    retention: list[Retention] = [1.0, 0.5, 0.33, 0.25]
    """Cache sizes to measure, as the part of the cache that is kept. At size r, groups of round(1 / r) layers share the
    K/V of their first layer, whatever routing.policy is. Results are named by two decimals (eval/loss@0.50), in which
    the sizes must differ."""

    at_start: bool = False
    """Whether a run evaluates before its first step too. metrics.jsonl has it as step 0."""

    questions: QuestionsConfig | None = None
    """Questions to answer at each evaluation, under the maps of retention. metrics.jsonl has exact match and token F1
    in percent, as SQuAD defines them, named like eval/token_f1@0.50. null: none."""

    best: str | None = None
    """Evaluation by which the best checkpoint is kept, such as loss@0.50 or token_f1@0.50. With several
    sources also the loss on one of them, named as in metrics.jsonl: loss@0.50/NAME. Where a loss is lower than all
    before, or a score higher, a checkpoint is written; it stays until a better one is there, whatever
    checkpoint.keep_last says, and train.output_dir/checkpoints/best names it. null: none is kept for its value."""

    patience: int | None = Field(default=None, gt=0)
    """How many evaluations in a row without a better value of best end the run. Needs best. null: it goes on to
    train.steps."""

    @field_validator("retention")
    @classmethod
    def _names_differ(cls, value: list[float]) -> list[float]:
        names = [f"{retention:.2f}" for retention in value]
        if not names or len(set(names)) < len(names):
            raise ValueError("retention needs at least one value, and values that differ in two decimals")
        return value
