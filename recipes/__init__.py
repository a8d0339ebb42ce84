"""Scripts to launch, not a package to import."""

raise ImportError(
    "recipes: a folder of scripts was imported; the library is peftrec; launch a script with: "
    "accelerate launch recipes/finetune.py --config recipes/configs/ml-100k/click_lora.yaml"
)
