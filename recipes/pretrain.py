"""Let an adapter read the texts of a domain before it sees any answer: domain-adaptive pretraining, no labels needed.

    python recipes/pretrain.py --config recipes/configs/ml-100k/click_lora.yaml --text "{title} ({year}): {genres}"
    python recipes/pretrain.py --config … --texts reviews.parquet --column text --output_dir runs/read

The recipe says which model, adapter, training and data; the texts are those of its items, or a column of any table. A
causal model learns to go on with them, an encoder to fill in masked words. OUTPUT_DIR/adapter is what a recipe's
`start: {adapter: OUTPUT_DIR}` begins with.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from importlib.metadata import version
from pathlib import Path

from peftrec import adapters, artifact, backbone, config, earlier, interactions, pretraining, record, tables
from peftrec.errors import ConfigError, DataError, as_one_line
from peftrec.prompts import item_texts
from peftrec.values import is_template


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a recipe; any of its keys can follow as --section.key value")
    parser.add_argument("--text", help="an item as text, over the columns of the items table (default: prompt.item)")
    parser.add_argument("--texts", help="a table with texts, in place of the items: CSV, Parquet, JSONL or a Hub id")
    parser.add_argument("--column", default="text", help="its column (default: text)")
    parser.add_argument("--resume", action="store_true", help="do nothing if output_dir holds the same, finished")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in output_dir")
    arguments, overrides = parser.parse_known_args()
    recipe = config.load_recipe(arguments.config, overrides)
    folder = Path(recipe.output_dir)
    pretraining.check(recipe)
    told = f"{config.dump_recipe(recipe)}# text: {arguments.text}, texts: {arguments.texts}, {arguments.column}\n"
    if not may_begin(folder, told, resume=arguments.resume, overwrite=arguments.overwrite):
        print(f"{folder}: this run has ended; there is nothing to do")
        return
    backbone.quiet()
    texts = read_texts(recipe, arguments)
    language = pretraining.load(recipe)
    backbone.check_window(language.model, recipe.prompt.max_tokens)
    print(f"{len(texts):,} texts, {language.objective} language modelling of {language.base.name}", flush=True)
    scratch = folder / "checkpoints"
    model, found = pretraining.learn(language, texts, recipe, scratch)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    adapters.save(model, folder / "adapter")
    base = {one.name: getattr(language.base, one.name) for one in dataclasses.fields(artifact.Base)}
    about = earlier.Pretrained(
        base_model=artifact.Base(**{**base, "name": artifact.public_name(language.base.name)}),
        objective=language.objective,
        texts=len(texts),
        sha256=pretraining.hash_of(texts),
        tokens=found.tokens,
        loss_before=found.loss_before,
        loss_after=found.loss_after,
        peftrec_version=version("peftrec"),
    )
    earlier.write_pretrained(folder / "adapter", about)
    with record.atomic(folder / "config.yaml") as written:  # last: it says that the rest is there
        written.write_text(told)
    print(
        f"held-back texts: {found.loss_before:.3f} nats a token before, {found.loss_after:.3f} after; "
        f"{found.tokens:,} tokens in {found.seconds:.0f} s\neverything is in {folder}; start: {{adapter: {folder}}}"
    )


def may_begin(folder: Path, told: str, *, resume: bool, overwrite: bool) -> bool:
    """Whether there is something to do in `folder`.

    Raises:
        ConfigError: it holds something else.
    """
    known = folder / "config.yaml"
    if not folder.exists() or overwrite or not any(folder.iterdir()):
        return True
    if resume and known.is_file() and known.read_text() == told:
        return False
    raise ConfigError(f"output_dir: {folder} holds something else; choose another output_dir, or add --overwrite")


def read_texts(recipe: config.Recipe, arguments: argparse.Namespace) -> list[str]:
    """Different texts, in the order of their source.

    Raises:
        ConfigError: both kinds of texts are named, or the template is none.
        DataError: the table or the column is not there.
    """
    if arguments.texts and arguments.text:
        raise ConfigError("--text: a template for items, and --texts names a table of its own; remove one of them")
    if arguments.texts:
        table = tables.scan(arguments.texts)
        found = tables.column_names(table, arguments.texts)
        if arguments.column not in found:
            raise DataError(
                f"--column: no column '{arguments.column}' in {arguments.texts} ({', '.join(found)}); use one of them"
            )
        column = tables.collect(table.select(arguments.column), arguments.texts)[arguments.column]
        texts = [str(text).strip() for text in column.drop_nulls().to_list()]
    else:
        template = arguments.text or recipe.prompt.item
        if not is_template(template):
            raise ConfigError(f"--text: {template!r}; expected plain {{column}} names, as in '{{title}} ({{year}})'")
        data = interactions.load(recipe.data, recipe.seed, recipe.task)
        texts = item_texts(data.items, template)
    return [text for text in dict.fromkeys(texts) if text]


if __name__ == "__main__":
    with as_one_line():
        main()
