"""Whether a recipe's keys fit each other: which do nothing beside the others, and which cannot stand together.

The sections themselves are defined downstream, in `config`, which asks here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from peftrec import compatibility
from peftrec.schema import leaves, show
from peftrec.values import REPO_ID, is_folder, placeholders

METHOD_KEYS = {
    "lora": ("variant", "r", "lora_alpha", "lora_dropout", "target_modules"),
    "adalora": (
        *("init_r", "target_r", "lora_alpha", "lora_dropout", "target_modules"),
        *("tinit", "tfinal", "deltaT", "orth_reg_weight"),
    ),
    "bottleneck": ("variant", "reduction_factor", "non_linearity", "dropout", "target_modules"),
    "prefix": ("num_virtual_tokens", "prefix_projection", "encoder_hidden_size"),
    "prompt": ("num_virtual_tokens", "prompt_tuning_init"),
    "p_tuning": (
        *("num_virtual_tokens", "encoder_reparameterization_type"),
        *("encoder_hidden_size", "encoder_num_layers"),
    ),
    "ia3": ("target_modules", "feedforward_modules"),
    "ln_tuning": ("target_modules",),
    "full": (),
    "other": ("peft_type", "fields"),
    "none": (),
}
"""The keys of the section `adapter` that each method has, beside `method`."""

KNOW_CLICKS_ALONE = ("item_mean", "bias", "mf", "popularity")
"""Baselines that tell drawn negatives from what a person answered."""

_TABLE_COLUMNS = ("user_id", "item_id", "timestamp", "rating", "label", "title", "instruction", "input", "output")
_FILE_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet", ".pq", ".json", ".jsonl", ".ndjson")


def idle(recipe: Any) -> dict[str, str]:
    """Keys that do nothing in this recipe -> the key whose value makes them so."""
    data, kind, layout = recipe.data, recipe.data.split.kind, recipe.prompt.layout
    four_bits, method, hub, align = recipe.model.load_in_4bit, recipe.adapter.method, recipe.hub, recipe.align
    source = "data.interactions" if data.interactions else "data.records"
    own_files = isinstance(data.records, dict) or (data.interactions or data.records or "").lower().endswith(
        _FILE_SUFFIXES
    )
    cases = (
        (data.name, "data.name", "data.items data.users data.columns data.hub_revision"),
        (data.name is None, source, "data.folder"),
        (own_files, source, "data.hub_revision"),
        (data.records is None, "data.name" if data.name else source, "data.records_as"),
        (data.records_as == "prompts", "data.records_as", "data.record_marks"),
        (data.records, "data.records", "data.items data.users data.items_where data.like_at data.rating_range"),
        (data.records, "data.records", "prompt.user eval.user_groups data.sampled_negatives"),
        (recipe.task == "rating", "task", "data.sampled_negatives"),
        (data.sampled_negatives, "data.sampled_negatives", "data.like_at data.rating_range"),
        (data.prompts, "data.records", "prompt.item prompt.header prompt.history prompt.max_history eval.baselines"),
        (recipe.prompt.user is None and not recipe.eval.user_groups, "prompt.user", "data.users"),
        (isinstance(data.records, dict), "data.records", _keys(data.split, "data.split.")),
        (kind != "column", "data.split.kind", "data.split.column"),
        (kind != "kfold", "data.split.kind", "data.split.folds data.split.fold"),
        (kind in ("leave_last_out", "column"), "data.split.kind", "data.split.valid data.split.test"),
        (kind == "kfold", "data.split.kind", "data.split.test"),
        (layout == "timeline", "prompt.layout", "prompt.template prompt.user prompt.max_history"),
        (layout == "pointwise", "prompt.layout", "prompt.overlap"),
        (recipe.prompt.template, "prompt.template", "prompt.header"),
        (not four_bits, "model.load_in_4bit", "model.bnb_4bit_quant_type model.bnb_4bit_use_double_quant"),
        (True, "adapter.method", " ".join(f"adapter.{name}" for name in _of_other_methods(recipe.adapter))),
        (
            method == "prefix" and not recipe.adapter.prefix_projection,
            "adapter.prefix_projection",
            "adapter.encoder_hidden_size",
        ),
        (
            method == "p_tuning" and recipe.adapter.encoder_reparameterization_type == "MLP",
            "adapter.encoder_reparameterization_type",
            "adapter.encoder_num_layers",
        ),
        (method == "none", "adapter.method", _keys(recipe.train, "train.") + " eval.base_model"),
        (
            recipe.prompt.template is not None or data.prompts,
            "prompt.template" if recipe.prompt.template is not None else "data.records",
            "train.history_dropout train.history_sample train.shuffle_within",
        ),
        (recipe.train.order == "random", "train.order", "train.shuffle_within"),
        (method == "none", "adapter.method", "prompt.paraphrases"),
        (method == "none", "adapter.method", _keys(recipe.card, "card.") + " start.adapter"),
        (recipe.start.adapter is None, "start.adapter", "start.revision start.stack"),
        (not recipe.train.teachers, "train.teachers", "train.distill"),
        (recipe.task == "rating", "task", "train.pairwise"),
        (layout == "pointwise", "prompt.layout", "train.pairwise"),
        (recipe.train.lr_scheduler_type == "constant", "train.lr_scheduler_type", "train.warmup_steps"),
        (recipe.score.head == "linear", "score.head", "score.loss"),
        (recipe.score.prior == "none", "score.prior", "score.blend"),
        (recipe.score.head != "tokens", "score.head", "eval.base_model"),
        (recipe.task == "rating" and recipe.prompt.history == "all", "prompt.history", "data.like_at"),
        (recipe.train.evals == 0, "train.evals", "train.early_stopping_patience train.metric_for_best_model"),
        (is_folder(hub.repo_id), "hub.repo_id", "hub.private hub.revision hub.create_pr hub.tag hub.commit_message"),
        (not recipe.side.used, "side.als", "side.hidden_size side.dropout"),
        (method == "none", "adapter.method", "align.kind"),
        (not align.used, "align.kind", _keys(align, "align.", but="align.kind")),
        (align.target.name is None, "align.target.name", "align.target.folder"),
        (align.target.interactions is None, "align.target.interactions", "align.target.items align.target.columns"),
        (not hub.push, "hub.push", _keys(hub, "hub.", but="hub.push")),
    )
    return {key: decider for applies, decider, keys in cases if applies for key in keys.split()}


def _keys(section: Any, prefix: str, but: str = "") -> str:
    """All keys of a section, in one text."""
    return " ".join(key for key in leaves(section.__class__, prefix) if key != but)


def _of_other_methods(adapter: Any) -> list[str]:
    """Keys of the section `adapter` that its method does not have."""
    return [one.name for one in dataclasses.fields(adapter) if one.name not in ("method", *METHOD_KEYS[adapter.method])]


def conflicts(recipe: Any) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Values that cannot work together: the key to name, the other keys involved, and the error text."""
    yield from _data_conflicts(recipe.data)
    yield from _prompt_conflicts(recipe)
    if recipe.eval.user_groups and recipe.data.name is None and recipe.data.users is None:
        yield "data.users", ("eval.user_groups", "data"), "missing; eval.user_groups names columns of it; set it"
    yield from _paraphrase_conflicts(recipe.prompt)
    yield from _task_conflicts(recipe)
    yield from _hub_conflicts(recipe)
    yield from _align_conflicts(recipe)
    yield from compatibility.conflicts(recipe)
    yield from _record_conflicts(recipe)
    if recipe.data.sampled_negatives:
        yield from _negative_conflicts(recipe)
    if recipe.model.load_in_4bit and recipe.model.load_in_8bit:
        text = "true, and model.load_in_4bit too; expected one of them at most; remove the other"
        yield "model.load_in_8bit", ("model.load_in_4bit",), text
    if recipe.train.order == "random" and recipe.eval.history == "streaming":
        text = "random; it lets a training event see later ones, which no streaming row can; set eval.history: frozen"
        yield "train.order", ("eval.history",), text


def _negative_conflicts(recipe: Any) -> Iterator[tuple[str, tuple[str, ...], str]]:
    drawn = ("data.sampled_negatives",)
    if recipe.prompt.history == "all":
        text = "all; nobody met what is drawn (data.sampled_negatives), so no history may show it; set it to liked"
        yield "prompt.history", drawn, text
    counts = "it counts what is drawn (data.sampled_negatives) as a person's answers, and whoever asks later has none"
    if recipe.score.prior not in ("none", *KNOW_CLICKS_ALONE):
        yield "score.prior", drawn, f"{recipe.score.prior}; {counts}; set it to mf, bias or none"
    if others := [name for name in recipe.eval.baselines if name not in KNOW_CLICKS_ALONE]:
        text = f"{', '.join(others)}; {counts}; expected some of {', '.join(KNOW_CLICKS_ALONE)}; leave the others out"
        yield "eval.baselines", drawn, text
    if recipe.side.als:
        yield "side.als", drawn, f"true; {counts}; set it to false"
    if recipe.score.blend:
        yield "score.blend", drawn, f"true; {counts}; set it to false"
    if recipe.align.used:
        text = f"{recipe.align.kind}; it aligns with events, of which drawn ones (data.sampled_negatives) are none"
        yield "align.kind", drawn, f"{text}; leave one of them out"


def _record_conflicts(recipe: Any) -> Iterator[tuple[str, tuple[str, ...], str]]:
    data, kind = recipe.data, recipe.data.split.kind
    if recipe.score.prior != "none" and data.prompts is not None:
        text = f"{recipe.score.prior}; prompts have no items to count the ratings of; set data.records_as: events"
        yield "score.prior", ("data.records",), text
    if data.records is None or data.prompts is not None:
        return
    if recipe.task == "rating":
        text = "events; records tell of likes, not of ratings; set task: click, or data.records_as: prompts"
        yield "data.records_as", ("task",), text
    if recipe.eval.history == "frozen":
        text = "frozen; it hides what a record tells of its person; leave it out"
        yield "eval.history", ("data.records_as",), text
    if isinstance(data.records, str) and kind not in ("column", "cold_user"):
        text = f"{kind}; it would cut records apart; set it to column or cold_user, or give a file for each split"
        yield "data.split.kind", ("data.records_as",), text


def _hub_conflicts(recipe: Any) -> Iterator[tuple[str, tuple[str, ...], str]]:
    hub = recipe.hub
    if not hub.push:
        return
    if hub.repo_id is None:
        yield "hub.repo_id", ("hub.push",), f"missing; hub.push needs to know where to: expected {REPO_ID}"
    if recipe.adapter.method == "none":
        yield "hub.push", ("adapter.method",), "true, and adapter.method: none makes no adapter; set it to false"
    if hub.create_pr and hub.revision not in (None, "main"):
        text = f"{hub.revision}; a pull request (hub.create_pr) is made against main; remove one of them"
        yield "hub.revision", ("hub.create_pr",), text


def _align_conflicts(recipe: Any) -> Iterator[tuple[str, tuple[str, ...], str]]:
    target = recipe.align.target
    if not recipe.align.used:
        return
    if not (target.name or target.interactions or target.items_where):
        text = (
            f"missing; align.kind: {recipe.align.kind} needs another domain's events; set align.target.items_where, "
            "align.target.interactions or align.target.name"
        )
        yield "align.target", ("align.kind",), text
    elif _own(target, recipe.data):
        text = "names the recipe's own events; expected another domain; change its items_where, or its source"
        yield "align.target", ("data",), text
    if target.name and target.interactions:
        text = f"{target.interactions}, and align.target.name too; expected one source; remove the other"
        yield "align.target.interactions", ("align.target.name",), text


def _own(target: Any, data: Any) -> bool:
    """Whether the other domain is the recipe's own one."""
    ours = (data.name, data.folder, data.interactions)
    named = (target.name, target.folder, target.interactions)
    chosen, kept = ({column: set(one) for column, one in part.items_where.items()} for part in (target, data))
    return named in ((None, None, None), ours) and chosen == kept


def _task_conflicts(recipe: Any) -> Iterator[tuple[str, tuple[str, ...], str]]:
    choice, answers = recipe.train.metric_for_best_model, recipe.prompt.answers
    if recipe.task == "click":
        if recipe.score.loss == "squared_error":
            yield "score.loss", ("task",), "squared_error; clicks have no distances; set task: rating, or cross_entropy"
        if "user_mean" in recipe.eval.baselines:
            yield "eval.baselines", ("task",), "user_mean; it predicts ratings; set task: rating, or leave it out"
        if answers is not None and len(answers) != 2:
            text = f"{show(answers)}; expected two for clicks, first for not liked, then for liked"
            yield "prompt.answers", ("task",), text
    elif recipe.prompt.history == "liked" and recipe.data.like_at is None and recipe.data.name is None:
        text = "missing; prompt.history: liked needs to know which ratings are liked: set it to the lowest of them"
        yield "data.like_at", ("prompt.history", "data", "task"), text
    if recipe.task == "rating" and recipe.score.calibration == "temperature":
        text = "temperature; it is one of log-odds, and ratings have none; set it to isotonic or none"
        yield "score.calibration", ("task",), text
    if recipe.task == "rating" and "lstm" in recipe.eval.baselines:
        yield "eval.baselines", ("task",), "lstm; it predicts clicks; set task: click, or leave it out"
    allowed = {"click": ("loss", "auc", "uauc"), "rating": ("loss", "rmse", "mae", "uauc")}[recipe.task]
    if choice not in allowed:
        text = f"{choice}; task: {recipe.task} has {', '.join(allowed)}; choose one of them"
        yield "train.metric_for_best_model", ("task",), text


def _data_conflicts(data: Any) -> Iterator[tuple[str, tuple[str, ...], str]]:
    sources = [f"data.{name}" for name in ("name", "interactions", "records") if getattr(data, name) is not None]
    if not sources:
        yield "data", (), "no source; expected one of data.name, data.interactions and data.records; add one"
    if len(sources) > 1:
        yield "data", (), f"{' and '.join(sources)} given; expected one source of data; remove the others"
    if (
        data.like_at is not None
        and data.rating_range
        and not data.rating_range[0] < data.like_at <= data.rating_range[1]
    ):
        low, high = data.rating_range
        text = (
            f"{data.like_at:g} gives all rows one label; expected above {low:g} and up to {high:g} (data.rating_range)"
        )
        yield "data.like_at", ("data.rating_range",), text
    split = data.split
    if split.kind == "column" and split.column is None:
        text = "missing; data.split.kind: column needs the name of the column that holds train, valid or test"
        yield "data.split.column", ("data.split.kind",), text
    if split.kind == "kfold" and split.fold >= split.folds:
        text = f"{split.fold}; expected below data.split.folds ({split.folds}): folds are counted from 0"
        yield "data.split.fold", ("data.split.folds", "data.split.kind"), text
    if split.kind in ("temporal", "cold_user", "cold_item") and split.valid + split.test >= 1:
        text = f"valid {split.valid:g} and test {split.test:g} leave nothing to train on; expected a sum below 1"
        yield "data.split", (), text
    for ours, theirs in data.columns.items():
        if ours not in _TABLE_COLUMNS and theirs in _TABLE_COLUMNS:
            text = f"{ours}: {theirs} is the wrong way round; expected our name first; write {theirs}: {ours}"
            yield "data.columns", (), text


def _paraphrase_conflicts(prompt: Any) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Each has to show what the template shows."""
    if prompt.template is None:
        return
    wanted = set(placeholders(prompt.template))
    for one in prompt.paraphrases:
        try:
            names = set(placeholders(one))
        except ValueError as error:
            yield "prompt.paraphrases", ("prompt.template",), f"{show(one)}; {error}; expected a template; mend it"
            continue
        if names != wanted:
            shown = ", ".join(f"{{{name}}}" for name in sorted(wanted))
            text = f"{show(one)}; expected {shown} in it, as in prompt.template; add what is missing, remove the rest"
            yield "prompt.paraphrases", ("prompt.template",), text


def _prompt_conflicts(recipe: Any) -> Iterator[tuple[str, tuple[str, ...], str]]:
    prompt, records = recipe.prompt, recipe.data.prompts is not None
    if prompt.layout == "timeline":
        if records:
            yield "prompt.layout", ("data.records",), "timeline; ready-made prompts (data.records) need pointwise"
        if prompt.overlap >= prompt.max_tokens:
            text = f"{prompt.overlap} tokens; expected fewer than prompt.max_tokens ({prompt.max_tokens}); lower it"
            yield "prompt.overlap", ("prompt.max_tokens", "prompt.layout"), text
        if recipe.model.attn_implementation == "flash_attention_2":
            text = "flash_attention_2 cannot hide events of one time from each other; a timeline needs sdpa or eager"
            yield "model.attn_implementation", ("prompt.layout",), text
    elif prompt.template is not None:
        names = set(placeholders(prompt.template))
        if records and not names <= {"instruction", "input"}:
            text = f"{show(prompt.template)}; records have {{instruction}} and {{input}} only; remove the others"
            yield "prompt.template", ("data.records",), text
        if not records and not {"history", "item"} <= names:
            text = f"{show(prompt.template)}; expected {{history}} and {{item}} in it; add what is missing"
            yield "prompt.template", ("data",), text
        if not records and (odd := sorted(names - {"history", "item", "user"})):
            text = (
                f"{{{odd[0]}}} in it; expected {{history}}, {{item}} and {{user}} only; columns belong to prompt.item"
            )
            yield "prompt.template", ("data",), text
        if "user" in names and prompt.user is None:
            yield "prompt.user", ("prompt.template",), "missing; the template shows {user}: say what that is"
    if prompt.user is not None and prompt.layout == "pointwise":
        if "user" not in placeholders(prompt.template or ""):
            text = f"{show(prompt.user)}; no {{user}} in prompt.template, where it would stand; add it there"
            yield "prompt.user", ("prompt.template", "prompt.layout"), text
        if recipe.data.name is None and recipe.data.users is None:
            yield "data.users", ("prompt.user", "data"), "missing; prompt.user shows columns of it; set it to a table"
