"""The `peftrec` command. Training is a recipe of its own: accelerate launch recipes/finetune.py --config CONFIG."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

from peftrec.errors import ConfigError, PeftrecError

if TYPE_CHECKING:
    from peftrec.config import Recipe
    from peftrec.hub import Published
    from peftrec.recommender import Recommendation, Recommender

INTERRUPTED, REFUSED = 130, 2  # exit codes: as a shell gives for Ctrl-C; what the caller can mend


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code; an error that the caller can mend is a line on stderr and 2."""
    parser = _parser()
    given, rest = parser.parse_known_args(arguments)
    if rest and given.verb is not _validate:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    given.overrides = rest
    try:
        with _plain_warnings():
            given.verb(given)
        sys.stdout.flush()
    except PeftrecError as error:
        print(error, file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Python would flush to the closed pipe once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peftrec", description=__doc__)
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    verb = verbs.add_parser(
        "validate",
        help="check a recipe and the files that it names; no model is loaded",
        usage="peftrec validate [-h] CONFIG [--section.key VALUE ...]",
    )
    verb.add_argument("config", metavar="CONFIG", help="a recipe; any of its keys can follow as --section.key VALUE")
    verb.set_defaults(verb=_validate)

    verb = verbs.add_parser("datasets", help="list the data sets that are known by name")
    verb.set_defaults(verb=_datasets)

    verb = verbs.add_parser("recommend", help="rank items for a person by that person's history")
    verb.add_argument("adapter", metavar="ADAPTER", help="a run's folder, NAMESPACE/NAME on the Hub, or file:FOLDER")
    verb.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the Hub (default: main)")
    verb.add_argument(
        "--history",
        nargs="*",
        action="extend",
        default=[],
        metavar="TITLE:ANSWER",
        help="what the person met, oldest first, as 'Toy Story (1995):yes'; an id may stand for the title, "
        "a rating for the answer",
    )
    verb.add_argument(
        "--candidates", nargs="+", action="extend", metavar="TITLE", help="rank these; default: the whole items table"
    )
    verb.add_argument(
        "--user",
        metavar="JSON",
        help="what the prompt shows of the person, such as '{\"age\": 30}'",
    )
    verb.add_argument("--items", metavar="FILE", help="items table (default: that of the adapter's named data set)")
    verb.add_argument(
        "--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="names in the items table: item_id=movieId"
    )
    verb.add_argument("--base-model", metavar="MODEL", help="folder or Hub id to use as base model instead")
    verb.add_argument("--k", type=int, default=10, help="how many (default: 10)")
    verb.add_argument("--no-prior", action="store_true", help="leave the saved prior out of the scores")
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    verb.set_defaults(verb=_recommend)

    verb = verbs.add_parser(
        "score", help="score a table of pairs (user, item) of any size; a killed run is continued by the same command"
    )
    verb.add_argument("adapter", metavar="ADAPTER", help="a run's folder, NAMESPACE/NAME on the Hub, or file:FOLDER")
    verb.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the Hub (default: main)")
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
    verb.add_argument("--items", metavar="FILE", help="items table (default: that of the adapter's named data set)")
    verb.add_argument(
        "--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="names in these tables: item_id=movieId"
    )
    verb.add_argument("--base-model", metavar="MODEL", help="folder or Hub id to use as base model instead")
    verb.add_argument("--no-prior", action="store_true", help="leave the saved prior out of the scores")
    verb.add_argument("--part-rows", type=int, default=4096, metavar="N", help="rows of a part (default: 4096)")
    verb.set_defaults(verb=_score)

    verb = verbs.add_parser(
        "evaluate", help="compute every metric of a run again from its predictions; no model needed"
    )
    verb.add_argument("run", metavar="RUN", help="folder of a finished run")
    verb.add_argument("--split", choices=("test", "valid"), default="test", help="rows to measure (default: test)")
    verb.add_argument("--bootstrap", type=int, metavar="N", help="resamples behind the intervals (default: the run's)")
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    verb.set_defaults(verb=_evaluate)

    verb = verbs.add_parser("card", help="write the model card of a finished run, RUN/adapter/README.md, again")
    verb.add_argument("run", metavar="RUN", help="folder of a finished run")
    verb.add_argument("--repo-id", metavar="ID", help="where the adapter will be on the Hub, namespace/name")
    for name, text in {
        "license": "of the adapter, as the Hub writes it: apache-2.0",
        "contact": "where questions go",
        "intended-use": "what the adapter is for, and what it is not for",
        "citation": "how to cite the adapter",
        "language": "of the items' texts: en",
        "base-model": "the base model on the Hub where it was loaded from a local folder",
    }.items():
        verb.add_argument(f"--{name}", metavar="TEXT", help=f"{text}; kept in RUN/card.yaml")
    verb.set_defaults(verb=_card)

    verb = verbs.add_parser("export", help="write an adapter as one merged model, or as a LoRA folder for vLLM")
    verb.add_argument("adapter", metavar="RUN_OR_ADAPTER", help="folder of a finished run, or of its adapter")
    verb.add_argument("output", metavar="OUTPUT", help="folder to write, new or empty")
    verb.add_argument(
        "--format",
        choices=("merged", "vllm"),
        required=True,
        help="merged: base model and adapter as one model that transformers loads; vllm: the adapter, checked against "
        "what vLLM takes",
    )
    verb.add_argument("--base-model", metavar="MODEL", help="merged: folder or Hub id to use as base model instead")
    verb.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="merged: of the weights (default: float32)"
    )
    verb.set_defaults(verb=_export)

    verb = verbs.add_parser(
        "push",
        help="publish a run's adapter: checked, loaded back, one commit, read back",
        description="Publish a run's adapter. A finished run's card is written again first, to name the repository.",
    )
    verb.add_argument("run", metavar="RUN", help="folder of a finished run, or of its adapter")
    verb.add_argument("repo_id", metavar="REPO_ID", help="namespace/name on the Hub, or file:FOLDER")
    seen = verb.add_mutually_exclusive_group()
    seen.add_argument("--private", action="store_true", help="of a new repository: for your eyes only (default)")
    seen.add_argument("--public", action="store_true", help="of a new repository: for everyone")
    verb.add_argument("--revision", metavar="BRANCH", help="branch, made where there is none (default: main)")
    verb.add_argument("--create-pr", action="store_true", help="propose the commit as a pull request")
    verb.add_argument("--tag", metavar="NAME", help="name for the commit")
    verb.add_argument("--message", metavar="TEXT", help="first line of the commit")
    verb.add_argument(
        "--allow",
        nargs="+",
        action="extend",
        default=[],
        metavar="TEXT",
        help="beginnings of addresses, paths or ids that may be published, such as a contact's e-mail address",
    )
    verb.add_argument("--base-model", metavar="MODEL", help="folder or Hub id to load it back on instead")
    verb.add_argument("--dry-run", action="store_true", help="check everything and show the plan; write nothing")
    verb.add_argument("--yes", action="store_true", help="do not ask before publishing")
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    verb.set_defaults(verb=_push)

    verb = verbs.add_parser("pull", help="fetch an adapter, look at every file, and print its folder")
    verb.add_argument("repo_id", metavar="REPO", help="namespace/name on the Hub, or file:FOLDER")
    verb.add_argument("--revision", metavar="REVISION", help="branch, tag or commit (default: main)")
    verb.add_argument("--output", metavar="FOLDER", help="copy the files there (default: they stay in the Hub's cache)")
    verb.set_defaults(verb=_pull)

    verb = verbs.add_parser("info", help="what an adapter is and wants, and whether it was checked; no model is loaded")
    verb.add_argument("where", metavar="REPO", help="namespace/name on the Hub, or a folder of a run or an adapter")
    verb.add_argument("--revision", metavar="REVISION", help="branch, tag or commit (default: main)")
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    verb.set_defaults(verb=_info)

    verb = verbs.add_parser("list", help="adapters that somebody has pushed with peftrec")
    verb.add_argument("author", metavar="AUTHOR", help="a user or an organisation of the Hub")
    verb.add_argument("--json", action="store_true", help="print one JSON list")
    verb.set_defaults(verb=_list)

    verb = verbs.add_parser("space", help="write the folder of a Hugging Face Space in which anybody asks the adapter")
    verb.add_argument("run", metavar="RUN", help="folder of a finished run")
    verb.add_argument("output", metavar="OUTPUT", nargs="?", help="folder to write (default: RUN/space)")
    verb.add_argument(
        "--repo-id", metavar="NS/ADAPTER", help="the adapter on the Hub (default: its files are put into the folder)"
    )
    verb.add_argument("--revision", help="branch, tag or commit of it (default: main)")
    verb.add_argument("--title", help="of the page")
    verb.add_argument(
        "--items", metavar="FILE", help="items table to publish with the folder: ids, titles, prompt columns"
    )
    verb.add_argument(
        "--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="names in the items table: item_id=movieId"
    )
    verb.add_argument("--base-model", metavar="HUB_ID", help="the base model, where the run's was a local folder")
    verb.add_argument(
        "--package",
        metavar="URL",
        help="where pip finds peftrec, as git+https://... (default: it is put into the folder)",
    )
    verb.add_argument("--overwrite", action="store_true", help="write over an earlier folder; other files in it stay")
    verb.set_defaults(verb=_space)
    return parser


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Our own warnings as a line on stderr, without the place in the code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning, module="peftrec")
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        yield


# --- validate ---------------------------------------------------------------------------------------------------------


def _validate(given: argparse.Namespace) -> None:
    from peftrec import config

    recipe = config.load_recipe(given.config, given.overrides)
    from peftrec import interactions, values

    interactions.check(recipe.data, values.placeholders(recipe.prompt.item), recipe.task, config.of_users(recipe))
    if recipe.adapter.method == "other":  # the names are PEFT's, whose import takes seconds
        from peftrec import methods

        methods.check(recipe.adapter)
    print(f"{given.config}: valid")
    for name, text in _summary(recipe):
        print(f"  {name:<8} {text}")


def _summary(recipe: Recipe) -> Iterator[tuple[str, str]]:
    from peftrec import config
    from peftrec.schema import show

    data, train = recipe.data, recipe.train
    records = data.records if isinstance(data.records, str) else ", ".join((data.records or {}).values())
    users = f", {data.sample_users} users of it" if data.sample_users else ""
    yield "data", f"{data.name or data.interactions or records}{users}, split: {data.split.kind}"
    yield "prompt", f"{recipe.prompt.layout}, up to {recipe.prompt.max_tokens:,} tokens, item: {recipe.prompt.item}"
    yield "model", f"{recipe.model.name}, {recipe.model.dtype}"
    if recipe.adapter.method == "none":
        yield "adapter", "none: the base model is measured as it is"
    else:
        settings = config.recipe_to_dict(recipe)["adapter"]
        method = settings.pop("method")
        yield "adapter", ", ".join([method, *(f"{name} {show(value)}" for name, value in settings.items())])
        length = f"{train.max_steps} steps" if train.max_steps > 0 else f"{train.num_train_epochs:g} epochs"
        yield "train", f"{length}, learning rate {train.learning_rate:g} ({train.lr_scheduler_type})"
    yield "score", "model alone" if recipe.score.prior == "none" else f"model + {recipe.score.prior}"
    yield "eval", f"{recipe.eval.history} history, baselines: {', '.join(recipe.eval.baselines) or 'none'}"
    yield "output", recipe.output_dir
    if recipe.hub.push:
        yield "hub", f"pushed to {recipe.hub.repo_id}, {'private' if recipe.hub.private else 'public'} if it is new"


# --- datasets ---------------------------------------------------------------------------------------------------------


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


def _recommend(given: argparse.Namespace) -> None:
    columns = _columns(given)
    if given.k < 1:
        raise ConfigError(f"--k: {given.k}; expected a whole number from 1")
    user = None if given.user is None else _person(given.user)
    from peftrec.recommender import Recommender

    recommender = Recommender.from_pretrained(
        given.adapter,
        revision=given.revision,
        items=given.items,
        columns=columns,
        base_model=given.base_model,
        prior=not given.no_prior,
    )
    best = recommender.rank(given.history, given.candidates, k=given.k, user=user)
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


def _columns(given: argparse.Namespace) -> dict[str, str]:
    columns = dict(_pair(text) for text in given.columns)
    if columns and not given.items:
        raise ConfigError("--columns: no --items; expected the table that has these columns; add --items FILE")
    return columns


def _pair(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not (ours and equals and theirs):
        raise ConfigError(f"--columns: {text!r}; expected OURS=THEIRS, such as item_id=movieId")
    return ours, theirs


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


def _score(given: argparse.Namespace) -> None:
    columns = dict(_pair(text) for text in given.columns)
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


def _evaluate(given: argparse.Namespace) -> None:
    if given.bootstrap is not None and given.bootstrap < 0:
        raise ConfigError(f"--bootstrap: {given.bootstrap}; expected a whole number from 0")
    from peftrec import report

    comparison = report.compare_run(given.run, given.split, given.bootstrap)
    print(json.dumps(_no_nan(comparison.facts()), indent=2) if given.json else comparison.table())


def _no_nan(value: Any) -> Any:
    """JSON has no NaN: what is not defined is null."""
    if isinstance(value, dict):
        return {key: _no_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_no_nan(one) for one in value]
    return None if isinstance(value, float) and value != value else value


# --- card -------------------------------------------------------------------------------------------------------------


def _card(given: argparse.Namespace) -> None:
    from peftrec import card, card_facts, config

    if given.repo_id is not None and not card_facts.is_hub_id(given.repo_id):
        raise ConfigError(f"--repo-id: {given.repo_id!r}; expected a Hub id, namespace/name")
    names = ("license", "contact", "intended_use", "citation", "language", "base_model")
    told = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    path = card.write(given.run, card_facts.parse_author(told, "command line"), repo_id=given.repo_id)
    if told:
        facts = card_facts.read_facts(given.run)
        words = card_facts.overlaid(card_facts.read_author(given.run, facts), config.Author(**told))
        card_facts.write_author(given.run, words)
    print(path)


# --- export -----------------------------------------------------------------------------------------------------------


def _export(given: argparse.Namespace) -> None:
    if given.format == "vllm" and (given.base_model or given.dtype):
        option = "--base-model" if given.base_model else "--dtype"
        raise ConfigError(f"{option}: means nothing to --format vllm, which writes the adapter alone; leave it out")
    from peftrec import export

    if given.format == "vllm":
        lora = export.for_vllm(given.adapter, given.output)
        print(f"{lora.folder}: a LoRA adapter as vLLM takes them (checked by format; vLLM was not run); serve it with")
        print(f"  vllm serve {lora.base_model} --enable-lora --max-lora-rank {lora.max_lora_rank} \\")
        print(f"      --lora-modules {shlex.quote(f'recommend={lora.folder}')}")
        return
    done = export.merged(given.adapter, given.output, base_model=given.base_model, dtype=given.dtype or "float32")
    print(
        f"{done.folder}: a model of {done.bytes / 1e6:,.1f} MB; in float32 its scores differ from the adapter's by at "
        f"most {done.difference:.1g}"
    )


# --- push, pull, info, list -------------------------------------------------------------------------------------------


def _push(given: argparse.Namespace) -> None:
    asks = not (given.yes or given.dry_run)
    if asks and not sys.stdin.isatty():
        raise ConfigError("push: nobody to ask before publishing; expected a terminal; add --yes, or --dry-run")
    from functools import partial

    from peftrec import card, hub

    if not given.dry_run and card.can_name(given.run, given.repo_id):
        card.write(given.run, repo_id=given.repo_id)
    done = hub.push(
        given.run,
        given.repo_id,
        private=not given.public,
        revision=given.revision,
        create_pr=given.create_pr,
        tag=given.tag,
        commit_message=given.message,
        allow=given.allow,
        dry_run=given.dry_run,
        confirm=_confirm if asks else None,
        reload_check=partial(hub.check_reload, base_model=given.base_model),
    )
    if given.json:
        print(json.dumps(dataclasses.asdict(done), indent=2))
    elif done.dry_run and not asks:
        _show_plan(done)
    elif done.dry_run:
        print("nothing was published")
    else:
        print(_published(done))


def _published(done: Published) -> str:
    if not done.changed and done.tag is None:
        return f"{done.url}: everything was there already{f' ({done.commit})' if done.commit else ''}"
    where = f" as {done.commit} of {done.revision}" if done.commit else ""
    tagged = f", tagged {done.tag}" if done.tag else ""
    return f"{done.pr_url or done.url}: published{where}{tagged}, read back and equal"


def _show_plan(plan: Published) -> None:
    """What a push would do, file by file, on stderr where an answer is still to be printed."""
    seen = "" if plan.private is None else " (private)" if plan.private else " (public: everyone will see it)"
    place = "" if plan.revision is None else f", {plan.revision}"
    print(f"{plan.url}{place}{seen}")
    for what in ("added", "changed", "deleted"):
        for path, size in getattr(plan.difference, what).items():
            print(f"  {what:<7}  {size:>13,} bytes  {path}")
    if not plan.difference:
        print("  nothing to add, change or delete")


def _confirm(plan: Published) -> bool:
    if not plan.difference and plan.tag is None:
        return True
    # The plan is not what was asked for: with --json only that goes to stdout.
    with redirect_stdout(sys.stderr):
        _show_plan(plan)
        print("publish this? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _pull(given: argparse.Namespace) -> None:
    from peftrec import hub

    print(hub.pull(given.repo_id, given.revision, local_dir=given.output))


def _info(given: argparse.Namespace) -> None:
    from peftrec import hub

    found = hub.info(given.where, given.revision)
    print(json.dumps(found.facts(), indent=2, ensure_ascii=False) if given.json else "\n".join(found.lines()))


def _list(given: argparse.Namespace) -> None:
    from peftrec import hub

    found = hub.list_adapters(given.author)
    if given.json:
        print(json.dumps([dataclasses.asdict(one) for one in found], indent=2))
        return
    if not found:
        print(f"{given.author}: no adapters that peftrec pushed, or none for who asks")
    width = max((len(one.repo_id) for one in found), default=0)
    for one in found:
        seen = "private" if one.private else "public"
        print(f"{one.repo_id:<{width}}  {seen:<7}  {one.updated or '':<25}  {one.downloads:>9,} downloads")


# --- space ------------------------------------------------------------------------------------------------------------


def _space(given: argparse.Namespace) -> None:
    columns = _columns(given)
    from peftrec import space

    written = space.write(
        given.run,
        given.output,
        repo_id=given.repo_id,
        revision=given.revision,
        title=given.title,
        items=given.items,
        columns=columns,
        base_model=given.base_model,
        package=given.package,
        overwrite=given.overwrite,
    )
    print(f"{written.folder}: written")
    print(f"  adapter  {written.adapter}")
    print(f"  titles   {written.titles}")
    print(f"  try it   {shlex.join(['python', str(written.folder / 'app.py')])}")
