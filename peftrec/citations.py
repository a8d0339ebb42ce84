"""What people call an adapter method, and the paper to cite for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """An adapter method.

    Attributes:
        name: what people call it.
        reference: authors, title, place and year of its paper; empty where there is none to name.
        arxiv: number of the paper on arXiv.
    """

    name: str
    reference: str = ""
    arxiv: str = ""


METHODS: dict[tuple[str, str | None], Method] = {
    ("lora", None): Method(
        "LoRA", "Hu et al. LoRA: Low-Rank Adaptation of Large Language Models. ICLR 2022.", "2106.09685"
    ),
    ("lora", "rslora"): Method(
        "rsLoRA", "Kalajdzievski. A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA. 2023.", "2312.03732"
    ),
    ("lora", "dora"): Method(
        "DoRA", "Liu et al. DoRA: Weight-Decomposed Low-Rank Adaptation. ICML 2024.", "2402.09353"
    ),
    ("lora", "pissa"): Method(
        "PiSSA",
        "Meng et al. PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models. "
        "NeurIPS 2024.",
        "2404.02948",
    ),
    ("lora", "loftq"): Method(
        "LoftQ",
        "Li et al. LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models. ICLR 2024.",
        "2310.08659",
    ),
    ("adalora", None): Method(
        "AdaLoRA",
        "Zhang et al. Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning. ICLR 2023.",
        "2303.10512",
    ),
    ("bottleneck", None): Method(
        "bottleneck (Houlsby)",
        "Houlsby et al. Parameter-Efficient Transfer Learning for NLP. ICML 2019.",
        "1902.00751",
    ),
    ("bottleneck", "pfeiffer"): Method(
        "bottleneck (Pfeiffer)",
        "Pfeiffer et al. AdapterFusion: Non-Destructive Task Composition for Transfer Learning. EACL 2021.",
        "2005.00247",
    ),
    ("bottleneck", "parallel"): Method(
        "bottleneck (parallel)",
        "He et al. Towards a Unified View of Parameter-Efficient Transfer Learning. ICLR 2022.",
        "2110.04366",
    ),
    ("prefix", None): Method(
        "prefix tuning",
        "Li and Liang. Prefix-Tuning: Optimizing Continuous Prompts for Generation. ACL 2021.",
        "2101.00190",
    ),
    ("prompt", None): Method(
        "prompt tuning",
        "Lester et al. The Power of Scale for Parameter-Efficient Prompt Tuning. EMNLP 2021.",
        "2104.08691",
    ),
    ("p_tuning", None): Method("p-tuning", "Liu et al. GPT Understands, Too. 2021.", "2103.10385"),
    ("ia3", None): Method(
        "IA3",
        "Liu et al. Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning. "
        "NeurIPS 2022.",
        "2205.05638",
    ),
    ("ln_tuning", None): Method(
        "layer norm tuning",
        "Zhao et al. Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning. ICLR 2024.",
        "2312.11420",
    ),
    ("full", None): Method("full fine-tuning"),
}
"""The recipe's method and variant -> what to say of it; a variant that is not here is its method's first."""


def method(name: str, variant: str | None, peft_type: str | None = None) -> Method:
    """The method of a recipe's section `adapter`; of `other` only PEFT's name is known."""
    return METHODS.get((name, variant)) or METHODS.get((name, None)) or Method(peft_type or name)
