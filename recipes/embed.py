"""Vectors of the texts of items or users, by one process or several: `peftrec embed` for `accelerate launch`.

    accelerate launch --config_file recipes/accelerate/multi_cpu.yaml recipes/embed.py all-minilm-l6-v2 \
        --items ml-100k --item "{title} ({year}), {genres}" --output items.parquet

The processes share the texts through the cache folder, which several machines must have in common. The options are
those of `peftrec embed --help`.
"""

import sys

from peftrec.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["embed", *sys.argv[1:]]))
