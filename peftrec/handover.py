"""What is done with a run that is safe on the disk: answers to check copies by, a card, a first list, publication.

The adapter is loaded as a user would load it. The run is complete without any of this.
"""

from __future__ import annotations

import dataclasses
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from peftrec import artifact, card, config, hub
from peftrec.encode import Encoder
from peftrec.prompts import item_texts
from peftrec.recommender import Recommender
from peftrec.split import TEST, TRAIN, Log

PROBES = 8  # questions whose scores are saved with the adapter
MOST_CANDIDATES = {"timeline": 2000, "pointwise": 50}  # ranked at the end for one person; a prompt each is slow


def probe(
    folder: Path,
    about: artifact.Artifact,
    prior: Any,
    encoder: Encoder,
    log: Log,
    recipe: config.Recipe,
) -> None:
    """Load the adapter in float32 and keep what it answers to a few questions, for others to check their copy by.

    Args:
        folder: RUN/adapter.
        about: what it says of itself, without answers.
        prior: saved beside it, or None.
        encoder: of the run.
        log: the run's events.
        recipe: the run's.
    """
    recommender = Recommender.from_pretrained(
        folder, items=log.items, dtype="float32", prior=False, trust_remote_code=recipe.model.trust_remote_code
    )
    probes: list[artifact.Probe] = []
    record_probes: list[artifact.RecordProbe] = []
    if log.prompts is not None:
        asked = encoder.records_of(PROBES, recipe.seed)
        scores = recommender.score([], asked).tolist()
        record_probes = [artifact.RecordProbe(one, score) for one, score in zip(asked, scores, strict=True)]
    else:
        for history, candidate in encoder.questions_of(PROBES, recipe.seed):
            told = [(text, encoder.codec.answer_texts[answer]) for text, answer in history]
            (score,) = recommender.score(told, [candidate])
            ids = recommender.item_ids(told, [candidate]) if about.side else []
            probes.append(artifact.Probe(history, candidate, float(score), ids))
    about = dataclasses.replace(about, probes=probes, record_probes=record_probes)
    artifact.write(folder, about, prior)


def push(folder: Path, how: config.Hub) -> None:
    """Publish the adapter; whatever goes wrong, the run has not failed."""
    try:
        done = hub.push(
            folder,
            how.repo_id or "",
            private=how.private,
            revision=how.revision,
            create_pr=how.create_pr,
            tag=how.tag,
            commit_message=how.commit_message,
            allow=how.allow,
        )
    except Exception as error:  # hours of training must not look lost for any reason that there may be
        reason = " ".join((str(error) or type(error).__name__).split("\n")[0].split())
        print(f"warning: hub.push: {reason}; the run is complete; push it later: {how.command(folder)}")
    else:
        print(f"\n{done.pr_url or done.url}: published{f' as {done.commit}' if done.commit else ''}")


def write_card(folder: Path, repo_id: str | None = None) -> None:
    """The model card of a run; whatever goes wrong, the run has not failed."""
    on_hub = repo_id is not None and "/" in repo_id and not repo_id.startswith("file:")
    try:
        card.write(folder, repo_id=repo_id if on_hub else None)
    except Exception as error:  # whatever it is, the run is not lost for it
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"warning: no model card ({reason}); the run is complete; peftrec card {folder} tries again")


def recommend(folder: Path, log: Log, recipe: config.Recipe) -> None:
    """The best items for one person, if possible one without training events, beside what that person liked."""
    log = log.keep(log.met)
    count = np.bincount(log.user[log.split == TEST], minlength=len(log.user_ids))
    new = count.copy()
    new[log.user[log.split == TRAIN]] = 0
    person = int(np.argmax(new if new.any() else count))
    known, later = np.array_split(np.flatnonzero(log.user == person), 2)
    recommender = Recommender.from_pretrained(folder, items=log.items, trust_remote_code=recipe.model.trust_remote_code)
    ids = log.items["item_id"].to_list()
    # A large catalogue is cut to the items with the most training events.
    popular = np.argsort(-np.bincount(log.item[log.split == TRAIN], minlength=len(ids)), kind="stable")
    candidates = [ids[code] for code in popular[: MOST_CANDIDATES[recipe.prompt.layout]].tolist()]
    k = recipe.eval.recommend_k
    words = ["disliked", "liked"] if recipe.task == "click" else [f"{rating:g}" for rating in log.scale]
    about = None
    if recipe.prompt.user is not None and log.users is not None:
        about = log.users.row(person, named=True)
    best = recommender.rank(
        [(ids[log.item[row]], log.scale[log.label[row]]) for row in known], candidates, k=k, user=about
    )
    told = {ids[log.item[row]]: words[log.label[row]] for row in later}
    titles = item_texts(log.items, recipe.prompt.item)
    highest = len(log.scale) - 1
    before = [titles[log.item[row]] for row in known if log.label[row] == highest][: -k - 1 : -1]
    whom = "nobody trained on" if new.any() else "seen in training"
    print(f"\nperson {log.user_ids[person]} ({whom}): {len(known)} events known, {len(later)} later ones kept back")
    likes, figure = (f"rated {words[-1]}", "rating") if recipe.task == "rating" else ("liked", "chance")
    print(f"  {likes + ' before, latest first':<40}  {'best of ' + str(len(candidates)):<40}  {figure}  later")
    for old, one in zip_longest(before, best):
        shown = 0.0 if one is None else one.score if one.probability is None else one.probability
        right = f"{one.title[:40]:<40}  {shown:6.2f}  {told.get(one.item_id, '-')}" if one else ""
        print(f"  {(old or '')[:40]:<40}  {right}".rstrip())
