"""Shell. Tiny random bases of many architectures, and PEFT adapters on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import tokenizers
import torch
import transformers

from worker.validation.oracle import load_base

WORDS = 640
RANK = 8
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 5,
    "pad_token_id": 0,
    "initializer_range": 0.08,
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
HEADS = ("lm_head", "embed_tokens")


@dataclass(frozen=True)
class Base:
    """`refused`: modules for which 422 is the right answer, with why. `close`: logprobs may differ
    by so much, where vLLM's own base does.
    """

    config: str
    modules: tuple[str, ...] = (*ATTENTION, *MLP, *HEADS)
    more: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    close: float = 0.02


NO_HEADS = dict.fromkeys(HEADS, "vLLM's class has no LoRA layer for it")
EXPERTS_ABSENT = {"num_local_experts": 4, "num_experts_per_tok": 1}
BASES: dict[str, Base] = {
    "Llama": Base("LlamaConfig"),
    "Mistral": Base("MistralConfig", more={"head_dim": 32}, refused=NO_HEADS),
    "Qwen2": Base("Qwen2Config", refused=NO_HEADS),
    "Qwen3": Base("Qwen3Config", more={"head_dim": 32}),
    "Gemma2": Base("Gemma2Config", more={"head_dim": 32}, refused=NO_HEADS),
    "Gemma3": Base("Gemma3TextConfig", more={"head_dim": 32}, refused=NO_HEADS),
    "Phi3": Base("Phi3Config", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", *HEADS)),
    "Olmo2": Base("Olmo2Config", refused=NO_HEADS),
    "Granite": Base("GraniteConfig"),
    "GLM4": Base(
        "Glm4Config",
        (*ATTENTION, "gate_up_proj", "down_proj", *HEADS),
        {"head_dim": 32},
        refused=NO_HEADS | {"gate_up_proj": "vLLM expects gate_proj and up_proj"},
    ),
    "Cohere": Base("CohereConfig", refused={"lm_head": NO_HEADS["lm_head"]}),
    "OPT": Base(
        "OPTConfig",
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", *HEADS),
        {"ffn_dim": 256, "word_embed_proj_dim": 128, "do_layer_norm_before": True},
        ("intermediate_size", "num_key_value_heads", "initializer_range"),
        NO_HEADS,
    ),
    "GPT-NeoX": Base(
        "GPTNeoXConfig",
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "embed_out", "embed_in"),
        {},
        ("num_key_value_heads",),
        {"embed_out": NO_HEADS["lm_head"], "embed_in": NO_HEADS["lm_head"]},
    ),
    "Llama 4": Base(
        "Llama4TextConfig",
        (*ATTENTION, *MLP, *HEADS),
        {
            **EXPERTS_ABSENT,
            "intermediate_size": 128,
            "intermediate_size_mlp": 256,
            "head_dim": 32,
            "interleave_moe_layer_step": 100,
            "moe_layers": [],
            "attention_chunk_size": 256,
            "use_qk_norm": True,
        },
    ),
}

MLA_SIZES = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 2,
    "kv_lora_rank": 512,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
}
MLA = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "kv_b_proj")
MLA_BASES = {
    "DeepSeek-V2": Base("DeepseekV2Config", MLA, {**MLA_SIZES, "topk_method": "greedy"}),
    "DeepSeek-V2 Lite": Base(
        "DeepseekV2Config",
        ("q_proj", *MLA[2:]),
        {**MLA_SIZES, "topk_method": "greedy", "q_lora_rank": None},
    ),
    "DeepSeek-V3": Base("DeepseekV3Config", MLA, MLA_SIZES),
}


def make_base(base: Base, folder: Path) -> Path:
    """Norms that are not one and biases that are not zero, so that mistakes show."""
    sizes = {k: v for k, v in SIZES.items() if k not in base.without} | base.more
    config = getattr(transformers, base.config)(**sizes)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                start = torch.zeros_like(weight) if "bias" in name else weight
                weight.copy_(start + torch.randn(weight.shape) * 0.05)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    known = ["<pad>", "<s>", "</s>", "<unk>", "<a>", "<end>"]
    known += sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    known += [f"w{i}" for i in range(WORDS - len(known))]
    made = tokenizers.Tokenizer(tokenizers.models.BPE({w: i for i, w in enumerate(known)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", eos_token="<end>"
    )


def make_adapter(on: Path, folder: Path, modules: list[str], seed: int) -> None:
    """As if trained: PEFT begins with zeros."""
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=modules, task_type="CAUSAL_LM")
    model = peft.get_peft_model(load_base(str(on)), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                weight.copy_(torch.randn(weight.shape) * 0.2)
    model.save_pretrained(folder)
