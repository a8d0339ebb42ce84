"""Train the LSTM click model on a recipe's data and measure it beside the recipe's other baselines, on the same rows.

    python recipes/lstm.py --config recipes/configs/ml-100k/click_lora.yaml
    accelerate launch --config_file recipes/accelerate/multi_cpu.yaml recipes/lstm.py --config …          two processes

No language model is loaded: a minute on ml-100k. The same model stands in the table of recipes/finetune.py where
`eval.baselines` names `lstm`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os

from peftrec import backbone, config, encode, interactions, opponents, processes, report, split
from peftrec.draws import drawn_order
from peftrec.errors import ConfigError, as_one_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", required=True, help="a recipe for clicks; any key can follow as --section.key value"
    )
    arguments, overrides = parser.parse_known_args()
    recipe = config.load_recipe(arguments.config, overrides)
    if recipe.task != "click":
        raise ConfigError(f"{arguments.config}: task is {recipe.task}; the LSTM predicts clicks; expected task: click")
    state = processes.group()
    backbone.use_all_cores(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    # Data, then everything that counts or is trained without text; the LSTM stands first, the others beside it.
    data = interactions.load(recipe.data, recipe.seed, recipe.task, with_users=config.of_users(recipe))
    log = split.split(data, recipe.data.split, recipe.seed)
    names = dict.fromkeys(("lstm", *recipe.eval.baselines, "mf"))
    asked = dataclasses.replace(recipe, eval=dataclasses.replace(recipe.eval, baselines=list(names)))
    known = opponents.measure(log, asked)
    if not state.is_main_process:
        return
    drawn = drawn_order(len(log.user_ids), recipe.seed, "evaluated users")
    rows = encode.whole_users(log.rows(split.TEST), log.user, recipe.eval.max_test_rows, drawn)
    for warning in data.warnings:
        print(f"warning: {warning}")
    print(report.compare_scores(log, rows, known.scores, recipe).table())
    chosen = known.settings["lstm"]
    print(f"LSTM: {chosen['best_epoch']} epochs kept, log loss of the validation rows {chosen['valid_log_loss']:.4f}")


if __name__ == "__main__":
    with as_one_line():
        main()
