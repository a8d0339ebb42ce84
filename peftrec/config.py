"""The recipe: one frozen dataclass per stage, read from YAML, changed on the command line, checked all at once.

The annotations below are the schema: a type, the values allowed, and the text of the error. Nothing here imports torch
or polars, so a recipe is checked in milliseconds, and nothing in a recipe names code: it is data, also from a stranger.
A key that is absent or null has its default. A key that the rest of the recipe makes pointless is an error, because a
setting that silently does nothing is a result that nobody can explain.
"""

from __future__ import annotations

import copy
import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal

from peftrec import coherence
from peftrec.errors import ConfigError
from peftrec.schema import Check, Reader, dump_yaml, override, read_yaml, show
from peftrec.values import (
    REPO_ID,
    Count,
    Distinct,
    HubId,
    Language,
    License,
    NotNegative,
    Positive,
    Share,
    StepsOrShare,
    Template,
    Text,
    is_repo_id,
    placeholders,
)


@dataclass(frozen=True)
class Split:
    """Which rows train, which choose the checkpoint (valid), which are reported (test)."""

    kind: Literal["temporal", "leave_last_out", "kfold", "cold_user", "cold_item", "column"] = "temporal"
    """By time over all users, each user's last two events, random folds, unseen users or items, or a given column."""
    valid: Share = 0.1
    """Share for validation: of the rows (`kfold`: of those outside the test fold), or of the users or items where
    those are held out."""
    test: Share = 0.1
    """Share for the test, counted like `valid`; `kfold` takes one fold instead."""
    column: Text | None = None
    """Column that holds train, valid or test in each row (kind: column)."""
    folds: Annotated[int, Check("a whole number from 2", lambda n: n >= 2)] = 5
    """Number of folds (kind: kfold)."""
    fold: Annotated[int, Check("a whole number from 0", lambda n: n >= 0)] = 0
    """The fold that is the test, counted from 0 (kind: kfold)."""


RecordFiles = Annotated[
    dict[str, Text],
    Check("the three files train, valid and test", lambda files: set(files) == {"train", "valid", "test"}),
]


RecordMarks = Annotated[
    dict[str, Text],
    Check("the three words liked, disliked and target", lambda marks: set(marks) == {"liked", "disliked", "target"}),
]


@dataclass(frozen=True)
class Data:
    """Where the tables come from and what counts as liked."""

    name: Text | None = None
    """A data set that peftrec knows; exactly one of `name`, `interactions` and `records` is given."""
    folder: Text | None = None
    """Folder with the files of a named data set that cannot be fetched, as its owners publish them."""
    interactions: Text | None = None
    """The user's own events: a CSV, Parquet or JSONL file, or a Hub data set id (`namespace/name` or `…:split`)."""
    hub_revision: Text | None = None
    """Commit, tag or branch of the Hub data set; null is its main branch."""
    items: Text | None = None
    """The items table, one row per item_id; not needed where the interactions have a title column."""
    users: Text | None = None
    """The users table, one row per user_id, where `prompt.user` or `eval.user_groups` names columns of it."""
    records: Text | RecordFiles | None = None
    """Ready-made prompts (instruction, input, output): one JSON or JSONL file to split, or one each for
    train, valid and test."""
    records_as: Literal["prompts", "events"] = "prompts"
    """Prompts are learned as they are written, one answer each. As events, the titles that a prompt lists as liked or
    not and the one that it asks for become one person's events, each with an answer to learn, and the recipe writes
    them by its own prompt."""
    record_marks: RecordMarks = field(
        default_factory=lambda: {
            "liked": "User Preference:",
            "disliked": "User Unpreference:",
            "target": "Whether the user will like the target",
        }
    )
    """The words of a record behind which its titles stand, each in double quotation marks."""
    columns: dict[str, Text] = field(default_factory=dict)
    """Our column name -> the name in the files, as in `{user_id: uid, item_id: movieId}`."""
    like_at: float | None = None
    """A rating from here on is liked. Clicks need it where the table has ratings and no labels; ratings need it for
    `prompt.history: liked` only."""
    rating_range: (
        Annotated[list[float], Check("two numbers, lowest and highest", lambda r: len(r) == 2 and r[0] < r[1])] | None
    ) = None
    """Lowest and highest rating of the scale, both included; a rating outside is an error."""
    items_where: dict[str, Annotated[list[Text], Check("at least one value", bool), Distinct]] = field(
        default_factory=dict
    )
    """Keep the items of one domain: column of the items table -> the values that it may have, as in
    `{genres: [Drama, War]}`. Of a cell that lists several, by commas or `|`, each must be among them: recipes whose
    lists share no value have no item in common."""
    sampled_negatives: Annotated[int, Check("a whole number from 1 to 100", lambda n: 1 <= n <= 100)] | None = None
    """Where every event is a click and nothing says what was not clicked: so many items beside each event, drawn by the
    seed among those that others had met by then and its person meets nowhere. Null draws none."""
    sample_users: Count | None = None
    """Keep this many users, drawn by the seed, with all their events; null keeps everybody."""
    train_events: Count | None = None
    """Learn from this many training events alone, the first ones of people drawn by the seed; the other training events
    are as if nobody had recorded them. Null keeps all."""
    split: Split = field(default_factory=Split)
    """How rows become train, valid and test."""

    @property
    def prompts(self) -> str | dict[str, str] | None:
        """The records that are learned as they are written, if there are any."""
        return self.records if self.records_as == "prompts" else None


@dataclass(frozen=True)
class Prompt:
    """How events become text."""

    layout: Literal["timeline", "pointwise"] = "timeline"
    """One text per user with an answer read at every event, or one prompt per event to score."""
    item: Template = "{title}"
    """An item as text, over the columns of the items table."""
    header: str | None = None
    """Text before the first event, word for word; a line break is added if it ends in none. Null says in one line what
    the answers mean, by the task."""
    history: Literal["all", "liked"] = "all"
    """Whether earlier events that were not liked are shown."""
    max_tokens: Annotated[int, Check("a whole number from 16", lambda n: n >= 16)] = 1024
    """Longest window or prompt (tokens); the oldest events are left out first."""
    overlap: Annotated[int, Check("a whole number from 0", lambda n: n >= 0)] = 256
    """Earlier events that a following window repeats as context (tokens; timeline)."""
    max_history: Count | None = None
    """Most events shown before the one to score (pointwise); null shows as many as fit."""
    template: Template | None = None
    """The whole prompt (pointwise), with {history} and {item}, or {instruction} and {input} for records. An encoder
    reads it as two texts, the second of which begins with {item} (or {input}), or behind a tab."""
    user: Template | None = None
    """A person as text, over the columns of the users table; stands where the template has {user}."""
    paraphrases: Annotated[list[Text], Distinct] = field(default_factory=list)
    """Other wordings of the template or, without one, of the header: training draws one of all for each prompt or
    window and epoch; evaluation and the adapter keep the recipe's own."""
    answers: Annotated[list[Text], Check("at least two answers", lambda a: len(a) > 1), Distinct] | None = None
    """One answer text for not liked and one for liked, or one for each rating from the lowest; a leading space is part
    of the token. Null takes no and yes, or the ratings as the tokenizer can write them in one token."""


@dataclass(frozen=True)
class Model:
    """The base model."""

    name: Text = "smollm2-135m-instruct"
    """A packaged model, a Hub model id, or a local folder."""
    revision: Text | None = None
    """Commit, tag or branch on the Hub; null is the main branch."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base weights; of a quantized model's, the type of the computation and of what stays whole. `auto` is
    bfloat16 where the processor computes in it, and float32 elsewhere; run.json says which it was."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention code of transformers."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; only the command line may say so, never a file."""
    load_in_4bit: bool = False
    """Quantize the linear layers to 4 bits; the adapter also fits the model as it is."""
    load_in_8bit: bool = False
    """Quantize the linear layers to 8 bits; the adapter also fits the model as it is."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 16 values of 4 bits: those of a normal distribution, or floating point (4-bit)."""
    bnb_4bit_use_double_quant: bool = True
    """Quantize the scales too, which saves another 0.4 bits a weight (4-bit)."""


@dataclass(frozen=True)
class Adapter:
    """What is trained; the names are those of PEFT. docs/methods.md says which keys belong to which method."""

    method: Literal[
        "lora",
        "adalora",
        "bottleneck",
        "prefix",
        "prompt",
        "p_tuning",
        "ia3",
        "ln_tuning",
        "full",
        "other",
        "none",
    ] = "lora"
    """`full` trains all weights of the base model, `other` is any method of PEFT, `none` leaves the base model as it
    is."""
    variant: Literal["plain", "rslora", "dora", "pissa", "loftq", "houlsby", "pfeiffer", "parallel"] | None = None
    """Kind of `lora` (plain to loftq; null is plain) or of `bottleneck` (houlsby to parallel; null is houlsby)."""
    r: Count = 16
    """Rank of the update."""
    lora_alpha: Count = 32
    """Scale: the update is multiplied by lora_alpha / r (by lora_alpha alone under `adalora`)."""
    lora_dropout: Annotated[float, Check("a share from 0 to below 1", lambda x: 0 <= x < 1)] = 0.0
    """Share of the adapter's inputs dropped in training."""
    target_modules: Text | Annotated[list[Text], Check("at least one module name", bool), Distinct] | None = None
    """Layers that get an adapter: all-linear, a regular expression, or a list of name endings. Null is all-linear for
    `lora`, and what PEFT has for the architecture elsewhere."""
    init_r: Count = 24
    """Rank of each layer at the start (`adalora`)."""
    target_r: Count = 16
    """Mean rank of all layers at the end (`adalora`)."""
    tinit: StepsOrShare = 0.1
    """Steps before the first rank is taken away: below 1 a share of the run (`adalora`)."""
    tfinal: StepsOrShare = 0.3
    """Steps after the last one: below 1 a share of the run (`adalora`)."""
    deltaT: Count = 1  # noqa: N815 (PEFT's name)
    """Steps from one allocation of ranks to the next (`adalora`)."""
    orth_reg_weight: NotNegative = 0.5
    """Weight of what keeps an update's directions apart, added to the loss (`adalora`)."""
    reduction_factor: Count = 16
    """Width of the layer divided by that of the bottleneck."""
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """Between the bottleneck's two matrices."""
    dropout: Annotated[float, Check("a share from 0 to below 1", lambda x: 0 <= x < 1)] = 0.0
    """Share of the bottleneck's units dropped in training."""
    num_virtual_tokens: Count = 20
    """Trained tokens in front of the prompt."""
    prefix_projection: bool = False
    """Train the prefix through a network of two layers, which is not saved."""
    prompt_tuning_init: Literal["SAMPLE_VOCAB", "RANDOM"] = "SAMPLE_VOCAB"
    """Start from embeddings of words drawn by the seed, or from noise (`prompt`)."""
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    """Network through which the virtual tokens are trained (`p_tuning`)."""
    encoder_hidden_size: Count | None = None
    """Width of that network (`prefix` with projection, `p_tuning`); null is the model's own."""
    encoder_num_layers: Count = 2
    """Layers of the LSTM (`p_tuning`)."""
    feedforward_modules: Text | Annotated[list[Text], Distinct] | None = None
    """Those of target_modules whose inputs are scaled, not their outputs (`ia3`)."""
    peft_type: Text | None = None
    """PEFT's name of the method (`other`)."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Settings of that method under PEFT's names (`other`)."""


@dataclass(frozen=True)
class Start:
    """The adapter that training starts from; without one it starts from the base model."""

    adapter: Text | None = None
    """An earlier run or its adapter's folder, what `recipes/pretrain.py` or `peftrec merge` wrote, or a Hub id."""
    revision: Text | None = None
    """Commit, tag or branch on the Hub; null is the main branch."""
    stack: bool = False
    """Leave the earlier adapter as it is and train a new one on top of it (`lora`); both are saved as one."""


@dataclass(frozen=True)
class Score:
    """How the model's output becomes a score, and what it is trained to."""

    head: Literal["tokens", "classifier", "linear"] = "tokens"
    """Answer tokens through the model's own output matrix, one trained output for each answer, or a single trained
    output: the log-odds of a click, or the rating."""
    loss: Literal["cross_entropy", "squared_error"] = "cross_entropy"
    """Of the answers' probabilities, or of the expected rating."""
    prior: Literal["none", "bias", "mf", "bpmf"] = "none"
    """`bias`: the model learns what the closed-form user and item bias leaves over; `mf`: what matrix
    factorisation does; `bpmf`: what Bayesian matrix factorisation with side information does."""
    blend: bool = False
    """Weigh the prior with the item's mean, by the order within people, and with what the person answered of late: the
    last 3, 10 and 30 events, and all."""
    calibration: Literal["none", "temperature", "isotonic"] = "none"
    """A curve through which scores go at the end, fitted on the validation rows: one factor for the log-odds of clicks,
    or any that rises."""


@dataclass(frozen=True)
class Side:
    """Vectors beside an event's text, which trained projectors turn into a soft token."""

    als: bool = False
    """What a factorisation of the training answers knows of the item and, by then, of the person."""
    items: Text | Annotated[list[Text], Check("at least one file", bool), Distinct] | None = None
    """A Parquet, safetensors or npz file, or several, with item_id and vector."""
    users: Text | None = None
    """Such a file with user_id and vector; the adapter keeps nobody's, and whoever asks gives it."""
    hidden_size: Count = 64
    """Width of a projector's hidden layer."""
    dropout: Annotated[float, Check("a share from 0 to below 1", lambda x: 0 <= x < 1)] = 0.1
    """Share of the events whose vectors are left out in training, so that the text is learned from too."""

    @property
    def used(self) -> bool:
        """Whether there are any."""
        return bool(self.als or self.items or self.users)


@dataclass(frozen=True)
class OtherDomain:
    """Events of another domain, whose answers nobody reads.

    `split` and `sample_users` are those of `data`; without `name` and `interactions`, so is all but `items_where`.
    """

    name: Text | None = None
    """A data set that peftrec knows; neither `name` nor `interactions` is the recipe's own data set."""
    folder: Text | None = None
    """As in `data`."""
    interactions: Text | None = None
    """A table as in `data`; it needs no label and no rating."""
    items: Text | None = None
    """As in `data`."""
    columns: dict[str, Text] = field(default_factory=dict)
    """As in `data`."""
    items_where: dict[str, Annotated[list[Text], Check("at least one value", bool), Distinct]] = field(
        default_factory=dict
    )
    """As in `data`: which items are the other domain."""


@dataclass(frozen=True)
class Align:
    """A loss that is to bring a domain without answers nearer, beside that of the answers."""

    kind: Literal["none", "coral", "mmd", "adversarial", "cpc"] = "none"
    """States at the questions alike in both domains: by covariances (`coral`), by kernels (`mmd`), or so that a
    classifier cannot tell them apart (`adversarial`); or states of the other domain that tell the next item (`cpc`)."""
    weight: Positive = 1.0
    """Of this loss beside the other one. The losses differ in size: see docs/transfer.md."""
    ramp: Annotated[float, Check("a share from 0 to 1", lambda x: 0 <= x <= 1)] = 0.5
    """Share of the run in which the weight grows from 0; 0 begins with all of it."""
    target: OtherDomain = field(default_factory=OtherDomain)
    """The other domain."""

    @property
    def used(self) -> bool:
        """Whether there is such a loss."""
        return self.kind != "none"


@dataclass(frozen=True)
class Train:
    """The optimisation; the names are those of transformers.TrainingArguments."""

    num_train_epochs: Positive = 1.0
    """Passes over the training windows; `max_steps` takes precedence."""
    max_steps: Annotated[int, Check("-1 or a whole number from 1", lambda n: n == -1 or n >= 1)] = -1
    """Optimiser steps; -1 leaves it to `num_train_epochs`."""
    learning_rate: Positive = 5e-4
    """Peak learning rate."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = "cosine"
    """Course of the learning rate."""
    warmup_steps: StepsOrShare = 0.05
    """Steps of rising learning rate: below 1 a share of the run, else a number of steps."""
    weight_decay: NotNegative = 0.0
    """Weight decay of AdamW."""
    history_dropout: Annotated[float, Check("a share from 0 to below 1", lambda x: 0 <= x < 1)] = 0.0
    """Share of the events, drawn anew for each window and epoch, that no other event of a training window sees."""
    history_sample: Count | None = None
    """Most events of a training window that others see, drawn anew for each window and epoch; null is no bound."""
    shuffle_within: Annotated[int, Check("a whole number from 0", lambda n: n >= 0)] = 0
    """Events of a training window at most so many seconds apart change places, anew in each epoch; 0 keeps all."""
    fgm_epsilon: NotNegative = 0.0
    """Learn from each batch once more with its input embeddings moved so far (L2 norm of a row) to where the loss
    grows; 0 does not, anything else doubles the time of a step."""
    average_checkpoints: Count = 1
    """Keep the mean of the last so many checkpoints' weights (see `evals`); 1 keeps the best checkpoint."""
    max_grad_norm: NotNegative = 1.0
    """Longest gradient (L2 norm); 0 does not clip."""
    per_device_train_batch_size: Count = 1
    """Rows per forward pass and device; a row holds up to `prompt.max_tokens` tokens."""
    gradient_accumulation_steps: Count = 4
    """Forward passes per optimiser step."""
    evals: Annotated[int, Check("a whole number from 0", lambda n: n >= 0)] = 4
    """Validation passes spread over the run; each also saves a checkpoint."""
    early_stopping_patience: Count | None = None
    """Stop after this many validation passes without a better one; null never stops early."""
    order: Literal["time", "random"] = "time"
    """A training event sees the events before it in time, or any others of its user in an order drawn by the seed: for
    random folds, where a row to predict knows later events too."""
    pairwise: NotNegative = 0.0
    """Weight of a second loss beside that of each event: a window's liked events should score above its others (clicks,
    timeline). 0 leaves it out."""
    teachers: Annotated[list[Text], Distinct] = field(default_factory=list)
    """Runs of this recipe under other seeds: what they answer together is learned beside each event's own answer."""
    distill: Annotated[float, Check("a share above 0, up to 1", lambda x: 0 < x <= 1)] = 0.5
    """How much the teachers' answer counts; the rest is the event's own."""
    metric_for_best_model: Literal["loss", "auc", "uauc", "rmse", "mae"] = "loss"
    """Validation metric that chooses the checkpoint to keep."""
    logging_steps: Count = 10
    """Optimiser steps between two logged training losses."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, slower."""
    torch_compile: bool = False
    """Compile the model: a slow start, then faster steps."""
    report_to: Literal[
        "none", "tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "clearml", "swanlab", "dvclive"
    ] = "none"
    """Experiment tracker, which must be installed."""


@dataclass(frozen=True)
class Eval:
    """What is measured and what an evaluated row may know."""

    history: Literal["streaming", "frozen"] = "streaming"
    """Every event earlier in time whichever its split, or training events only; the baselines know the same."""
    ties: Literal["isolate", "order"] = "isolate"
    """Events with one timestamp do not see each other's answers, or see those earlier in row order."""
    slices: Annotated[list[Literal["cold_item", "cold_user", "popularity"]], Distinct] = field(
        default_factory=lambda: ["cold_item", "cold_user", "popularity"]
    )
    """Groups of test rows reported apart."""
    user_groups: Annotated[list[Text], Distinct] = field(default_factory=list)
    """Columns of the users table (age, gender) by which test rows are reported apart, too."""
    baselines: Annotated[
        list[
            Literal[
                "user_mean", "item_mean", "bias", "mf", "bpmf", "item_knn", "svd", "svdpp", "gbdt", "lstm", "popularity"
            ]
        ],
        Distinct,
    ] = field(default_factory=lambda: ["item_mean", "bias", "popularity"])
    """Scorers reported beside the model. `user_mean` is for ratings, `mf` is matrix factorisation by alternating least
    squares, `bpmf` Bayesian matrix factorisation with genres, years and what a person chose, `lstm` (clicks) two
    embeddings and an LSTM over a person's events; `item_knn`, `svd`, `svdpp` and `gbdt` (boosted trees on counts and
    genres) need the extra: pip install 'peftrec[baselines]'."""
    base_model: bool = True
    """Also score the base model without the adapter."""
    max_valid_rows: Count | None = None
    """Most validation rows scored, whole users drawn by the seed (at least one user); null scores all."""
    max_test_rows: Count | None = None
    """Most test rows scored, whole users drawn by the seed (at least one user); null scores all."""
    bootstrap: Annotated[int, Check("a whole number from 0", lambda n: n >= 0)] = 1000
    """Resamples of the users for the 95 % intervals; 0 gives none."""
    recommend_k: Count = 10
    """Items in a recommendation."""


@dataclass(frozen=True)
class Author:
    """What the model card says that no run knows. Texts are Markdown."""

    license: License | None = None
    """Of the adapter."""
    contact: Text | None = None
    """Where questions go."""
    intended_use: Text | None = None
    """What the adapter is for, and what it is not for."""
    citation: Text | None = None
    """How to cite the adapter."""
    language: Language | None = None
    """Of the items' texts; data sets that peftrec knows by name say it themselves."""
    base_model: HubId | None = None
    """The base model on the Hub where it was loaded from a local folder."""


@dataclass(frozen=True)
class Hub:
    """Publishing at the end of the run; `peftrec push RUN REPO_ID` does the same later."""

    push: bool = False
    """Publish the adapter once the run is complete on disk; a push that fails costs nothing but a warning."""
    repo_id: Annotated[str, Check(REPO_ID, is_repo_id)] | None = None
    """Where to: `namespace/name`, `name` for one of one's own, or `file:FOLDER`."""
    private: bool = True
    """Whether a repository that is made is for its owner's eyes only."""
    revision: Text | None = None
    """Branch, made where there is none; null is main."""
    create_pr: bool = False
    """Propose the commit as a pull request."""
    tag: Text | None = None
    """Name for the commit."""
    commit_message: Text | None = None
    """First line of the commit; null says the task."""
    allow: list[Text] = field(default_factory=list)
    """Beginnings of addresses, paths or ids that may be published, such as a contact's e-mail address."""

    def command(self, folder: str | Path) -> str:
        """The command that publishes the run in `folder` in the same way, later."""
        words = ["peftrec", "push", str(folder), self.repo_id or "REPO_ID", "" if self.private else "--public"]
        named = {"--revision": self.revision, "--tag": self.tag, "--message": self.commit_message}
        words += [word for name, value in named.items() if value for word in (name, value)]
        words += ["--create-pr" if self.create_pr else "", *(["--allow", *self.allow] if self.allow else [])]
        return shlex.join(filter(None, words))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, complete: the same recipe, data and versions give the same adapter."""

    task: Literal["click", "rating"] = "click"
    """What is predicted: whether an item is liked, or its rating."""
    data: Data
    """Tables, labels and split."""
    prompt: Prompt = field(default_factory=Prompt)
    """Text around the events."""
    model: Model = field(default_factory=Model)
    """Base model."""
    adapter: Adapter = field(default_factory=Adapter)
    """Trained parameters."""
    start: Start = field(default_factory=Start)
    """What training starts from."""
    score: Score = field(default_factory=Score)
    """Terms beside the model's own."""
    side: Side = field(default_factory=Side)
    """Vectors beside the text."""
    align: Align = field(default_factory=Align)
    """Another domain beside the data."""
    train: Train = field(default_factory=Train)
    """Optimisation."""
    eval: Eval = field(default_factory=Eval)
    """Measurement."""
    card: Author = field(default_factory=Author)
    """What its author says of the adapter."""
    hub: Hub = field(default_factory=Hub)
    """Publishing."""
    output_dir: Text
    """Folder of the run, created if need be."""
    seed: Annotated[int, Check("a whole number from 0 to 2**32 - 1", lambda n: 0 <= n < 2**32)] = 13
    """Seed of everything random."""


def of_users(recipe: Recipe) -> dict[str, str]:
    """Columns of the users table that a recipe uses -> the key that names them."""
    shown = placeholders(recipe.prompt.user or "") if recipe.prompt.layout == "pointwise" else []
    return dict.fromkeys(recipe.eval.user_groups, "eval.user_groups") | dict.fromkeys(shown, "prompt.user")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, changed by command-line arguments.

    Args:
        path: the YAML file.
        overrides: as in `["--train.learning_rate", "1e-4", "--seed=7"]`; the last of two wins.

    Raises:
        ConfigError: every mistake in the file and in the arguments, one line each.
    """
    changed = override(read_yaml(path), Recipe, overrides)
    reader = Reader(Recipe, str(path), changed.keys)
    reader.problems.extend(changed.problems)
    recipe = reader.section(Recipe, changed.mapping)
    if recipe.model.trust_remote_code and "model.trust_remote_code" not in changed.keys:
        reader.problem(
            "model.trust_remote_code",
            "true in a file, which may be a stranger's; only a person may allow a model to run its own code; "
            "remove it, and start with --model.trust_remote_code true",
        )
    return _checked(reader, recipe)


def parse_recipe(mapping: Mapping[str, Any], where: str) -> Recipe:
    """The recipe in nested mappings, such as `recipe_to_dict` gives; `where` names their origin in errors.

    Raises:
        ConfigError: every mistake, one line each.
    """
    reader = Reader(Recipe, where)
    return _checked(reader, reader.section(Recipe, mapping))


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Nested plain values that `parse_recipe` reads back, without the keys that do nothing in this recipe."""
    # Where nothing is published, or nothing stands beside text or data, that goes without saying.
    silent = {} if recipe.hub.push else {"hub.push": "hub.push"}
    silent |= {} if recipe.side.als else {"side.als": "side.als"}
    silent |= {} if recipe.align.used else {"align.kind": "align.kind"}
    silent |= {} if recipe.train.teachers else {"train.teachers": "train.teachers"}
    return _plain(recipe, "", coherence.idle(recipe) | silent)


def dump_recipe(recipe: Recipe) -> str:
    """YAML text that `load_recipe` reads back."""
    return dump_yaml(recipe_to_dict(recipe))


def _plain(section: Any, prefix: str, idle: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for one in dataclasses.fields(section):
        value, key = getattr(section, one.name), prefix + one.name
        if dataclasses.is_dataclass(value):
            value = _plain(value, f"{key}.", idle)
        if value is not None and value != {} and key not in idle:
            values[one.name] = copy.deepcopy(value)
    return values


def _checked(reader: Reader, recipe: Recipe) -> Recipe:
    """`recipe`, if it was read without mistakes and its keys fit each other."""

    def judged(*keys: str) -> bool:
        """Whether a mistake is known in or below one of these keys, so that more words would only confuse."""
        return any(bad == key or bad.startswith(f"{key}.") for bad in reader.bad for key in keys)

    found = [(key, others, text) for key, others, text in coherence.conflicts(recipe) if not judged(key, *others)]
    for key, decider in coherence.idle(recipe).items():
        if key in reader.given and not judged(key, decider):
            setting = show(reduce(getattr, decider.split("."), recipe)).strip("'")
            found.append((key, (), f"does nothing under {decider}: {setting}; remove it, or change {decider}"))
    for key, _, text in found:
        reader.problem(key, text)
    if reader.problems:
        raise ConfigError(*reader.problems)
    return recipe
