"""Verbs that bring an adapter to others: card, export, push, pull, info, list, space."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

from peftrec import cli_options
from peftrec.errors import ConfigError

if TYPE_CHECKING:
    from peftrec.cli_options import Verbs
    from peftrec.hub import Published


def add_verbs(verbs: Verbs) -> None:
    """The verbs of this module, for the parser of the whole command."""
    for add in (_add_card, _add_export, _add_merge, _add_push, _add_pull, _add_info, _add_list, _add_space):
        add(verbs)


# --- card -------------------------------------------------------------------------------------------------------------


def _add_card(verbs: Verbs) -> None:
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


def _add_export(verbs: Verbs) -> None:
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


# --- merge ------------------------------------------------------------------------------------------------------------


def _add_merge(verbs: Verbs) -> None:
    verb = verbs.add_parser("merge", help="write several LoRA adapters of one base model as one adapter")
    verb.add_argument("adapters", metavar="RUN_OR_ADAPTER", nargs="+", help="folders of runs or adapters, or Hub ids")
    verb.add_argument("--output", metavar="FOLDER", required=True, help="folder to write, new or empty")
    verb.add_argument(
        "--kind",
        choices=("svd", "cat", "linear", "ties", "dare_linear", "dare_ties"),
        default="svd",
        help="svd: the best adapter of one rank for the weighted sum (default); cat: the sum itself, with all ranks; "
        "linear, ties, dare_linear, dare_ties: PEFT's ways on the factors",
    )
    verb.add_argument("--weights", metavar="W", nargs="+", type=float, help="one for each (default: alike, sum 1)")
    verb.add_argument(
        "--density", metavar="D", type=float, help="share of values that ties and dare keep (default: 0.5)"
    )
    verb.add_argument("--rank", metavar="R", type=int, help="of svd (default: the highest of the adapters)")
    verb.add_argument("--base-model", metavar="MODEL", help="folder or Hub id to use as base model instead")
    verb.add_argument("--seed", type=int, default=13, help="of what dare drops (default: 13)")
    verb.set_defaults(verb=_merge)


def _merge(given: argparse.Namespace) -> None:
    from peftrec import merge

    done = merge.merge(
        given.adapters,
        given.output,
        weights=given.weights,
        kind=given.kind,
        density=given.density,
        r=given.rank,
        base_model=given.base_model,
        seed=given.seed,
    )
    print(f"{done.folder}: an adapter of rank {done.r} from {len(given.adapters)}, trained on {', '.join(done.names)}")


# --- push, pull, info, list -------------------------------------------------------------------------------------------


def _add_push(verbs: Verbs) -> None:
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
    cli_options.add_json(verb)
    verb.set_defaults(verb=_push)


def _add_pull(verbs: Verbs) -> None:
    verb = verbs.add_parser("pull", help="fetch an adapter, look at every file, and print its folder")
    verb.add_argument("repo_id", metavar="REPO", help="namespace/name on the Hub, or file:FOLDER")
    verb.add_argument("--revision", metavar="REVISION", help="branch, tag or commit (default: main)")
    verb.add_argument("--output", metavar="FOLDER", help="copy the files there (default: they stay in the Hub's cache)")
    verb.set_defaults(verb=_pull)


def _add_info(verbs: Verbs) -> None:
    verb = verbs.add_parser("info", help="what an adapter is and wants, and whether it was checked; no model is loaded")
    verb.add_argument("where", metavar="REPO", help="namespace/name on the Hub, or a folder of a run or an adapter")
    verb.add_argument("--revision", metavar="REVISION", help="branch, tag or commit (default: main)")
    cli_options.add_json(verb)
    verb.set_defaults(verb=_info)


def _add_list(verbs: Verbs) -> None:
    verb = verbs.add_parser("list", help="adapters that somebody has pushed with peftrec")
    verb.add_argument("author", metavar="AUTHOR", help="a user or an organisation of the Hub")
    cli_options.add_json(verb, "list")
    verb.set_defaults(verb=_list)


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


def _add_space(verbs: Verbs) -> None:
    verb = verbs.add_parser("space", help="write the folder of a Hugging Face Space in which anybody asks the adapter")
    verb.add_argument("run", metavar="RUN", help="folder of a finished run")
    verb.add_argument("output", metavar="OUTPUT", nargs="?", help="folder to write (default: RUN/space)")
    verb.add_argument(
        "--repo-id", metavar="NS/ADAPTER", help="the adapter on the Hub (default: its files are put into the folder)"
    )
    verb.add_argument("--revision", help="branch, tag or commit of it (default: main)")
    verb.add_argument("--title", help="of the page")
    cli_options.add_items(verb, "items table to publish with the folder: ids, titles, prompt columns")
    verb.add_argument("--base-model", metavar="HUB_ID", help="the base model, where the run's was a local folder")
    verb.add_argument(
        "--package",
        metavar="URL",
        help="where pip finds peftrec, as git+https://... (default: it is put into the folder)",
    )
    verb.add_argument("--overwrite", action="store_true", help="write over an earlier folder; other files in it stay")
    verb.set_defaults(verb=_space)


def _space(given: argparse.Namespace) -> None:
    columns = cli_options.columns_of_items(given)
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
