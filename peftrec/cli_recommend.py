"""Verbs around a recipe and its recommender: validate, datasets, recommend, score, evaluate."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from peftrec import cli_options
from peftrec.errors import ConfigError
from peftrec.imports import without_collection

if TYPE_CHECKING:
    from peftrec.cli_options import Verbs
    from peftrec.config import Recipe
    from peftrec.recommender import Recommendation, Recommender
    from peftrec.report import Comparison
    from peftrec.retrieval_run import Retrieval


def add_verbs(verbs: Verbs) -> None:
    """The verbs of this module, for the parser of the whole command."""
    for add in (_add_validate, _add_datasets, _add_recommend, _add_score, _add_evaluate):
        add(verbs)


# --- validate ---------------------------------------------------------------------------------------------------------


def _add_validate(verbs: Verbs) -> None:
    verb = verbs.add_parser(
        "validate",
        help="check a recipe and the files that it names; no model is loaded",
        usage="peftrec validate [-h] CONFIG [--section.key VALUE ...]",
    )
    verb.add_argument("config", metavar="CONFIG", help="a recipe; any of its keys can follow as --section.key VALUE")
    verb.set_defaults(verb=_validate, takes_overrides=True)


def _validate(given: argparse.Namespace) -> None:
    from peftrec import config

    recipe = config.load_recipe(given.config, given.overrides)
    from peftrec import calibration, opponents, sources, values

    opponents.check(recipe)
    calibration.check(recipe.score.calibration)
    sources.check(recipe.data, values.placeholders(recipe.prompt.item), recipe.task, config.of_users(recipe))
    if recipe.adapter.method == "other":  # the names are PEFT's, whose import takes seconds
        from peftrec import methods

        methods.check(recipe.adapter)
    if recipe.align.used:
        from peftrec import align

        align.check(recipe, values.placeholders(recipe.prompt.item))
    if recipe.side.used:
        from peftrec import side_vectors

        side_vectors.check(recipe.side)
    if recipe.start.adapter is not None:
        from peftrec import earlier

        if earlier.is_local(recipe):
            earlier.find(recipe)
    if recipe.train.teachers:
        from peftrec import teachers

        teachers.find(recipe)
    print(f"{given.config}: valid")
    for name, text in _summary(recipe):
        print(f"  {name:<8} {text}")


def _summary(recipe: Recipe) -> Iterator[tuple[str, str]]:
    from peftrec import config
    from peftrec.schema import show

    data, train = recipe.data, recipe.train
    records = data.records if isinstance(data.records, str) else ", ".join((data.records or {}).values())
    more = f", {data.sample_users} users of it" if data.sample_users else ""
    if data.sampled_negatives:
        more += f", {data.sampled_negatives} negatives drawn beside each click"
    yield "data", f"{data.name or data.interactions or records}{more}, split: {data.split.kind}"
    yield "prompt", f"{recipe.prompt.layout}, up to {recipe.prompt.max_tokens:,} tokens, item: {recipe.prompt.item}"
    yield "model", f"{recipe.model.name}, {recipe.model.dtype}"
    if recipe.adapter.method == "none":
        yield "adapter", "none: the base model is measured as it is"
    else:
        settings = config.recipe_to_dict(recipe)["adapter"]
        method = settings.pop("method")
        yield "adapter", ", ".join([method, *(f"{name} {show(value)}" for name, value in settings.items())])
        if recipe.start.adapter is not None:
            yield "start", f"{recipe.start.adapter}{', below a new adapter' if recipe.start.stack else ''}"
        if train.teachers:
            yield "teachers", f"{', '.join(train.teachers)}; their answers count {train.distill:g}"
        length = f"{train.max_steps} steps" if train.max_steps > 0 else f"{train.num_train_epochs:g} epochs"
        yield "train", f"{length}, learning rate {train.learning_rate:g} ({train.lr_scheduler_type})"
    curve = "" if recipe.score.calibration == "none" else f", calibrated ({recipe.score.calibration})"
    yield "score", f"{'model alone' if recipe.score.prior == 'none' else f'model + {recipe.score.prior}'}{curve}"
    if recipe.side.used:
        yield (
            "side",
            ", ".join(f"{name} {show(value)}" for name, value in config.recipe_to_dict(recipe)["side"].items()),
        )
    if recipe.align.used:
        other = recipe.align.target
        where = [*filter(None, (other.name, other.interactions)), *(show(one) for one in [other.items_where] if one)]
        yield "align", f"{recipe.align.kind}, weight {recipe.align.weight:g}, to {', '.join(where)} without answers"
    yield "eval", f"{recipe.eval.history} history, baselines: {', '.join(recipe.eval.baselines) or 'none'}"
    yield "output", recipe.output_dir
    if recipe.hub.push:
        yield "hub", f"pushed to {recipe.hub.repo_id}, {'private' if recipe.hub.private else 'public'} if it is new"


# --- datasets ---------------------------------------------------------------------------------------------------------


def _add_datasets(verbs: Verbs) -> None:
    verb = verbs.add_parser("datasets", help="list the data sets that are known by name")
    verb.set_defaults(verb=_datasets)


def _datasets(given: argparse.Namespace) -> None:
    from peftrec.datasets import DATASETS

    width = max(map(len, DATASETS))
    for name, one in DATASETS.items():
        print(f"{name:<{width}}  {one.description}")
        print(f"{'':<{width}}  {one.scale}; {'' if one.timed else 'no times; '}language: {one.language}")
        place = "fetched" if one.fetched else f"data.folder: a folder with {' and '.join(one.files)}"
        print(f"{'':<{width}}  {place}")
        print(f"{'':<{width}}  {one.license}")
        print(f"{'':<{width}}  {one.homepage}")


# --- recommend --------------------------------------------------------------------------------------------------------


def _add_recommend(verbs: Verbs) -> None:
    verb = verbs.add_parser("recommend", help="rank items for a person by that person's history")
    cli_options.add_adapter(verb)
    verb.add_argument(
        "--history",
        nargs="*",
        action="extend",
        default=[],
        metavar="TITLE:ANSWER",
        help="what the person met, oldest first, as 'Toy Story (1995):yes'; an id may stand for the title, "
        "a rating for the answer (where all are 0 or 1, these are no and yes)",
    )
    verb.add_argument(
        "--candidates", nargs="+", action="extend", metavar="TITLE", help="rank these; default: the whole items table"
    )
    verb.add_argument(
        "--user",
        metavar="JSON",
        help="what the prompt shows of the person, such as '{\"age\": 30}'",
    )
    cli_options.add_items(verb, "items table (default: that of the adapter's named data set)")
    verb.add_argument("--base-model", metavar="MODEL", help="folder or Hub id to use as base model instead")
    verb.add_argument("--k", type=int, default=10, help="how many (default: 10)")
    verb.add_argument(
        "--shortlist", type=int, metavar="N", help="score so many promising candidates only (default: all of them)"
    )
    verb.add_argument("--no-prior", action="store_true", help="leave the saved prior and calibration out of the scores")
    cli_options.add_json(verb)
    verb.set_defaults(verb=_recommend)


def _recommend(given: argparse.Namespace) -> None:
    columns = cli_options.columns_of_items(given)
    if given.k < 1:
        raise ConfigError(f"--k: {given.k}; expected a whole number from 1")
    user = None if given.user is None else _person(given.user)
    with without_collection():
        from peftrec.recommender import Recommender

        recommender = Recommender.from_pretrained(
            given.adapter,
            revision=given.revision,
            items=given.items,
            columns=columns,
            base_model=given.base_model,
            prior=not given.no_prior,
        )
    best = recommender.rank(given.history, given.candidates, k=given.k, user=user, shortlist=given.shortlist)
    show = _as_json if given.json else _as_text
    show(recommender, given.history, best)


def _person(text: str) -> dict[str, Any]:
    try:
        person = json.loads(text)
    except ValueError:
        person = None
    if not isinstance(person, dict):
        raise ConfigError(f"--user: {text!r}; expected a JSON object of columns, such as '{{\"age\": 30}}'")
    return person


def _as_text(recommender: Recommender, history: list[str], best: list[Recommendation]) -> None:
    answers = recommender.prompt.answers
    for event in recommender.events(history):
        unknown = len(recommender.catalogue) and event.item.row is None
        note = "  (not in the items table: read as it is)" if unknown else ""
        print(f"{event.item.text}:{answers[event.label]}{note}")
    chances = recommender.artifact.task == "click"
    print(f"{'rank':>4}  {'chance':>6}  {'score':>7}  title" if chances else f"{'rank':>4}  {'rating':>6}  title")
    for place, one in enumerate(best, 1):
        figures = f"{one.score:>6.2f}" if one.probability is None else f"{one.probability:>6.3f}  {one.score:>+7.3f}"
        print(f"{place:>4}  {figures}  {one.title}")


def _as_json(recommender: Recommender, history: list[str], best: list[Recommendation]) -> None:
    rates, scale = recommender.artifact.task == "rating", recommender.target.scale
    events = [
        {"title": event.item.text, "item_id": event.item.item_id}
        | ({"rating": scale[event.label]} if rates else {"label": event.label})
        for event in recommender.events(history)
    ]
    ranked = [
        {"title": one.title, "item_id": one.item_id, "score": one.score}
        | ({} if one.probability is None else {"probability": one.probability})
        for one in best
    ]
    print(json.dumps({"history": events, "recommended": ranked}, indent=2, ensure_ascii=False))


# --- score ------------------------------------------------------------------------------------------------------------


def _add_score(verbs: Verbs) -> None:
    verb = verbs.add_parser(
        "score", help="score a table of pairs (user, item) of any size; a killed run is continued by the same command"
    )
    cli_options.add_adapter(verb)
    verb.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help="Parquet, CSV or JSONL with user_id, item_id and maybe timestamp; other columns are kept",
    )
    verb.add_argument(
        "--output", required=True, metavar="FOLDER", help="for the scores: new, or that of the same command"
    )
    verb.add_argument(
        "--history",
        metavar="FILE",
        help="log with user_id, item_id, label or rating, and timestamp; a pair knows what came before its own time",
    )
    cli_options.add_items(verb, "items table (default: that of the adapter's named data set)", tables="these tables")
    cli_options.add_scorer(verb)
    verb.add_argument("--part-rows", type=int, default=4096, metavar="N", help="rows of a part (default: 4096)")
    verb.set_defaults(verb=_score)


def _score(given: argparse.Namespace) -> None:
    columns = cli_options.columns(given)
    from peftrec import scoring

    job = scoring.Job(
        adapter=given.adapter,
        input=given.input,
        output=given.output,
        history=given.history,
        items=given.items,
        columns=columns,
        base_model=given.base_model,
        prior=not given.no_prior,
        part_rows=given.part_rows,
        revision=given.revision,
    )
    done = scoring.score_table(job)
    if done.scored:
        print(f"scored {done.scored:,} pairs in {done.seconds:.1f} seconds, {done.scored / done.seconds:.1f} a second")
    if done.complete:
        print(
            f"{given.output}: complete, {done.rows:,} rows in {done.parts:,} parts; read {given.output}/{scoring.PARTS}"
        )


# --- evaluate ---------------------------------------------------------------------------------------------------------


def _add_evaluate(verbs: Verbs) -> None:
    verb = verbs.add_parser(
        "evaluate", help="compute every metric of a run again from its predictions; or let it rank items (--ranking)"
    )
    verb.add_argument("run", metavar="RUN", help="folder of a finished run")
    verb.add_argument("--split", choices=("test", "valid"), default="test", help="rows to measure (default: test)")
    verb.add_argument("--bootstrap", type=int, metavar="N", help="resamples behind the intervals (default: the run's)")
    verb.add_argument(
        "--ranking",
        type=int,
        metavar="N",
        help="instead: N users' held-out liked items, each to be found among 99 others and among all items",
    )
    verb.add_argument(
        "--baselines", nargs="+", metavar="NAME", help="with --ranking: as in eval.baselines (default: the run's)"
    )
    verb.add_argument("--no-adapter", action="store_true", help="with --ranking: the baselines alone, no model needed")
    verb.add_argument("--adapter-on-all", action="store_true", help="with --ranking: the adapter ranks all items, too")
    cli_options.add_json(verb)
    verb.set_defaults(verb=_evaluate)


def _evaluate(given: argparse.Namespace) -> None:
    if given.bootstrap is not None and given.bootstrap < 0:
        raise ConfigError(f"--bootstrap: {given.bootstrap}; expected a whole number from 0")
    comparison: Retrieval | Comparison
    if given.ranking is not None:
        comparison = _ranking(given)
    else:
        for name in ("baselines", "no_adapter", "adapter_on_all"):
            if getattr(given, name):
                raise ConfigError(
                    f"--{name.replace('_', '-')}: does nothing without --ranking; add it, or leave it out"
                )
        from peftrec import report

        comparison = report.compare_run(given.run, given.split, given.bootstrap)
    print(json.dumps(_no_nan(comparison.facts()), indent=2) if given.json else comparison.table())


def _ranking(given: argparse.Namespace) -> Retrieval:
    if given.ranking < 1:
        raise ConfigError(f"--ranking: {given.ranking}; expected a number of users, from 1")
    if given.no_adapter and given.adapter_on_all:
        raise ConfigError("--adapter-on-all: the adapter does not rank under --no-adapter; leave out one of them")
    if given.split != "test":
        raise ConfigError(f"--split: {given.split}; --ranking asks for test items; leave it out")
    from peftrec import retrieval_run

    return retrieval_run.rank_run(
        given.run,
        given.ranking,
        adapter=not given.no_adapter,
        adapter_on_all=given.adapter_on_all,
        baselines=given.baselines,
        resamples=given.bootstrap,
    )


def _no_nan(value: Any) -> Any:
    """JSON has no NaN: what is not defined is null."""
    if isinstance(value, dict):
        return {key: _no_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_no_nan(one) for one in value]
    return None if isinstance(value, float) and value != value else value
