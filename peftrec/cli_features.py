"""The verb around vectors of texts: embed."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from peftrec import cli_options

if TYPE_CHECKING:
    from peftrec.cli_options import Verbs


def add_verbs(verbs: Verbs) -> None:
    """The verbs of this module, for the parser of the whole command."""
    verb = verbs.add_parser("embed", help="make vectors of the texts of items, or of users by what they liked")
    verb.add_argument("model", metavar="MODEL", help="a base model or an adapter: a packaged name, a folder, a Hub id")
    verb.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the Hub (default: main)")
    verb.add_argument(
        "--base-model", metavar="MODEL", help="folder or Hub id to use as an adapter's base model instead"
    )
    verb.add_argument("--items", required=True, metavar="FILE_OR_DATASET", help="items table, or a data set by name")
    verb.add_argument("--output", required=True, metavar="FILE", help="to write: .parquet or .safetensors")
    verb.add_argument("--item", default="{title}", metavar="TEMPLATE", help="an item's text (default: {title})")
    verb.add_argument("--of", choices=("items", "users"), default="items", help="what gets vectors (default: items)")
    verb.add_argument("--history", metavar="FILE", help="users: log with user_id, item_id, label or rating")
    verb.add_argument("--users", metavar="FILE", help="users: table of what is known of them")
    verb.add_argument(
        "--profile",
        choices=("mean", "text"),
        default="mean",
        help="users: mean of the vectors of what they liked, or one text (default: mean)",
    )
    verb.add_argument("--user", metavar="TEMPLATE", help="users: their text, such as 'likes {genres}: {liked}'")
    verb.add_argument("--like-at", type=float, metavar="RATING", help="users: the lowest rating that is a like")
    verb.add_argument(
        "--half-life", type=float, metavar="EVENTS", help="users: an event counts half after so many more"
    )
    verb.add_argument(
        "--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="names in these tables: item_id=movieId"
    )
    verb.add_argument("--pooling", choices=("mean", "cls", "last"), help="of a text's tokens (default: mean)")
    verb.add_argument("--layer", type=int, default=-1, help="0 is the embedding matrix, -1 the last layer (default)")
    verb.add_argument("--no-normalize", action="store_true", help="leave vectors as long as they are")
    verb.add_argument("--max-tokens", type=int, default=256, help="a longer text is cut behind them (default: 256)")
    verb.add_argument("--batch-tokens", type=int, default=4096, help="tokens of one forward pass (default: 4096)")
    verb.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: float32)")
    verb.add_argument(
        "--no-cache", action="store_true", help="neither look vectors up in the cache nor keep them there"
    )
    verb.set_defaults(verb=_embed)


def _embed(given: argparse.Namespace) -> None:
    columns = cli_options.columns(given)
    from peftrec import embed
    from peftrec.embeddings import Reading

    reading = Reading(given.pooling, given.layer, not given.no_normalize, given.max_tokens)
    job = embed.Job(
        model=given.model,
        output=given.output,
        items=given.items,
        of=given.of,
        item=given.item,
        history=given.history,
        users=given.users,
        profile=given.profile,
        user=given.user,
        like_at=given.like_at,
        half_life=given.half_life,
        columns=columns,
        reading=reading,
        dtype=given.dtype,
        revision=given.revision,
        base_model=given.base_model,
        batch_tokens=given.batch_tokens,
        cache=not given.no_cache,
    )
    embed.embed(job)
