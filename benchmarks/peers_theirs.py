"""What people would use instead of this package, asked by peers.py; it runs in an environment of its own.

Nothing of this package is imported here: TRL, plain transformers and PEFT, and sentence-transformers as they come.
"""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from sentence_transformers import CrossEncoder
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, pipeline
from trl import SFTConfig, SFTTrainer
from workers import serve

MOST_TOKENS = 1024  # of a training row
TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
KNOWN: dict[str, Any] = {}  # what setup and the first call of a function leave for the next ones


def setup(device: str, dtype: str, base: str, adapter: str, encoder: str, lora: dict[str, Any]) -> dict[str, str]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    KNOWN.update(
        device=device, dtype=TYPES[dtype], base=base, adapter=adapter, encoder=encoder, lora=lora, tokenizer=tokenizer
    )
    import peft
    import sentence_transformers
    import trl

    return {made.__name__: made.__version__ for made in (trl, transformers, peft, sentence_transformers, torch)}


def base_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(KNOWN["base"], dtype=KNOWN["dtype"]).to(KNOWN["device"])


def seconds_now() -> float:
    if KNOWN["device"] == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# --- training ---------------------------------------------------------------------------------------------------------


def to_train() -> Any:
    torch.manual_seed(13)
    return get_peft_model(base_model(), LoraConfig(task_type="CAUSAL_LM", **KNOWN["lora"]))


class Clock(TrainerCallback):
    """Seconds inside optimizer steps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self._begin = seconds_now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop."""
        self.seconds += seconds_now() - self._begin


class CountTokens:
    """A collator that counts what it hands on, padding included."""

    def __init__(self, collate: Any) -> None:
        self.collate, self.tokens = collate, 0

    def __call__(self, rows: Any) -> Any:
        """Rows as a batch."""
        batch = self.collate(rows)
        self.tokens += batch["input_ids"].numel()
        return batch


def sft(
    rows: list[dict[str, str]],
    batch: int,
    packing: bool,
    learning_rate: float = 5e-4,
    adapter: str | None = None,
) -> dict[str, float]:
    """TRL's SFTTrainer over `rows` once; the loss counts the completion only.

    Args:
        rows: of prompt and completion.
        batch: rows of a step.
        packing: whether several share a row.
        learning_rate: at the start; it falls linearly.
        adapter: folder for what was learned.
    """
    if "sft" not in KNOWN:
        KNOWN["sft"] = to_train()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=KNOWN["sft"],
            args=SFTConfig(
                output_dir=folder,
                per_device_train_batch_size=batch,
                num_train_epochs=1,
                learning_rate=learning_rate,
                max_length=MOST_TOKENS,
                packing=packing,
                completion_only_loss=True,
                gradient_checkpointing=False,
                bf16=KNOWN["dtype"] is torch.bfloat16,
                use_cpu=KNOWN["device"] == "cpu",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=KNOWN["tokenizer"],
        )
        trainer.data_collator = counted = CountTokens(trainer.data_collator)
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
        if adapter:
            trainer.save_model(adapter)
    return {"seconds": clock.seconds, "events": len(rows), "tokens": counted.tokens}


def loop(rows: list[dict[str, str]], batch: int) -> dict[str, float]:
    """A loop as people write it: padded batches, labels masked up to the completion, the model's own loss."""
    if "loop" not in KNOWN:
        model = to_train().train()
        KNOWN["loop"] = model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    model, optimizer = KNOWN["loop"]
    tokenizer = KNOWN["tokenizer"]
    seconds = tokens = 0.0
    for first in range(0, len(rows), batch):
        ids, labels = [], []
        for row in rows[first : first + batch]:
            prompt = tokenizer(row["prompt"])["input_ids"]
            answer = tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
            ids.append(torch.tensor((prompt + answer)[-MOST_TOKENS:]))
            labels.append(torch.tensor(([-100] * len(prompt) + answer)[-MOST_TOKENS:]))
        made = {
            "input_ids": torch.nn.utils.rnn.pad_sequence(ids, True, tokenizer.pad_token_id),
            "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in ids], True),
            "labels": torch.nn.utils.rnn.pad_sequence(labels, True, -100),
        }
        begin = seconds_now()
        model(**{key: value.to(KNOWN["device"]) for key, value in made.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds += seconds_now() - begin
        tokens += made["input_ids"].numel()
    return {"seconds": seconds, "events": len(rows), "tokens": tokens}


# --- scoring ----------------------------------------------------------------------------------------------------------


def to_score() -> Any:
    if "scorer" not in KNOWN:
        KNOWN["scorer"] = PeftModel.from_pretrained(base_model(), KNOWN["adapter"]).eval()
    return KNOWN["scorer"]


def written(prompts: list[str], batch: int) -> dict[str, float]:
    """The pipeline as its page shows it: the next token as text, which gives an answer but no order."""
    if "pipeline" not in KNOWN:
        KNOWN["pipeline"] = pipeline(
            "text-generation", model=to_score(), tokenizer=KNOWN["tokenizer"], device=KNOWN["device"]
        )
    begin = seconds_now()
    KNOWN["pipeline"](prompts, max_new_tokens=1, do_sample=False, return_full_text=False, batch_size=batch)
    return {"seconds": seconds_now() - begin}


@torch.inference_mode()
def generated(prompts: list[str], batch: int, answers: list[int]) -> dict[str, Any]:
    """`generate` with the scores of its first token."""
    model, tokenizer = to_score(), KNOWN["tokenizer"]
    begin, odds = seconds_now(), []
    for first in range(0, len(prompts), batch):
        inputs = tokenizer(prompts[first : first + batch], return_tensors="pt", padding=True, padding_side="left")
        found = model.generate(
            **inputs.to(KNOWN["device"]),
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            pad_token_id=tokenizer.pad_token_id,
        ).scores[0]
        odds += (found[:, answers[1]] - found[:, answers[0]]).tolist()
    return {"seconds": seconds_now() - begin, "scores": odds}


@torch.inference_mode()
def forward(prompts: list[str], batch: int, answers: list[int], keep: int) -> dict[str, Any]:
    """One forward for each batch of prompts, padded at the left; `keep` positions get logits, 0 is all."""
    model, tokenizer = to_score(), KNOWN["tokenizer"]
    begin, odds = seconds_now(), []
    for first in range(0, len(prompts), batch):
        inputs = tokenizer(prompts[first : first + batch], return_tensors="pt", padding=True, padding_side="left")
        inputs = inputs.to(KNOWN["device"])
        places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = model(**inputs, position_ids=places, logits_to_keep=keep, use_cache=False).logits[:, -1].float()
        odds += (logits[:, answers[1]] - logits[:, answers[0]]).tolist()
    return {"seconds": seconds_now() - begin, "scores": odds}


def pairs(texts: list[list[str]], batch: int) -> dict[str, float]:
    """sentence-transformers' CrossEncoder, without an adapter, which favours it."""
    if "cross" not in KNOWN:
        KNOWN["cross"] = CrossEncoder(KNOWN["encoder"], num_labels=1, device=KNOWN["device"])
    model = KNOWN["cross"]
    begin = seconds_now()
    model.predict(texts, batch_size=batch, show_progress_bar=False)
    return {"seconds": seconds_now() - begin}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    serve({one.__name__: one for one in (setup, sft, loop, written, generated, forward, pairs)})
