"""Shell. Tiny random bases of many architectures, and PEFT adapters on them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import tokenizers
import torch
import transformers
from peft.utils import transformers_weight_conversion
from safetensors.torch import load_file, save_file

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
    """One base model. `refused`: modules for which 422 is the right answer -> the reason. `close`:
    how much logprobs may differ, if vLLM's own base differs from transformers already.

    `kind` is dense, moe or vl. `model` is transformers' class. `inside` is where the adapted layers
    lie, as a regular expression; "" for anywhere. `old_names`: what transformers before 4.52 said
    in place of `model.language_model.`. `files` are written beside the model.
    """

    config: str
    modules: tuple[str, ...] = (*ATTENTION, *MLP, *HEADS)
    more: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    close: float = 0.02
    kind: str = "dense"
    model: str = "AutoModelForCausalLM"
    inside: str = ""
    old_names: tuple[str, ...] = ()
    files: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    picture_prompt: tuple[int, ...] = ()
    saved_as: tuple[str, str] = ("", "")

    def targets(self, modules: list[str]) -> list[str] | str:
        """PEFT's target_modules for these modules."""
        return rf"{self.inside}.*\.({'|'.join(modules)})" if self.inside else modules


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
    "Olmo2": Base("Olmo2Config", refused={"lm_head": NO_HEADS["lm_head"]}),
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
        {
            "ffn_dim": 256,
            "word_embed_proj_dim": 128,
            "do_layer_norm_before": True,
            "init_std": 0.08,
        },
        ("intermediate_size", "num_key_value_heads", "initializer_range"),
        NO_HEADS,
    ),
    "GPT-NeoX": Base(
        "GPTNeoXConfig",
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "lm_head", "embed_in"),
        {},
        ("num_key_value_heads",),
        {"lm_head": NO_HEADS["lm_head"], "embed_in": NO_HEADS["lm_head"]},
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

EXPERTS = "experts"
"""The kind of adapter that changes the experts, as PEFT's target_parameters do."""
PER_EXPERT = "each expert"
"""The same experts, with a pair of tensors for each, as PEFT made them before transformers 5."""
ROUTER = "router"
"""The kind of adapter that changes which experts are asked: target_parameters of the gate."""
MOE_KINDS = (*ATTENTION, ROUTER, EXPERTS, PER_EXPERT)
MOE_BASES: dict[str, Base] = {
    "Qwen3 MoE": Base(
        "Qwen3MoeConfig",
        MOE_KINDS,
        {
            "head_dim": 32,
            "moe_intermediate_size": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [],
        },
        kind="moe",
    ),
    "Mixtral": Base(
        "MixtralConfig",
        MOE_KINDS,
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        kind="moe",
        expert_names=("w1", "w3", "w2"),
    ),
    "OLMoE": Base(
        "OlmoeConfig",
        MOE_KINDS,
        {"intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
        kind="moe",
    ),
}

MOE_BASES |= {
    "Qwen2 MoE": Base(
        "Qwen2MoeConfig",
        (*MOE_KINDS, "shared_expert.down_proj", "shared_expert_gate"),
        {
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [],
        },
        kind="moe",
    ),
    "GPT-OSS": Base(
        "GptOssConfig",
        (*ATTENTION, EXPERTS),
        {
            "head_dim": 32,
            "intermediate_size": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["full_attention", "full_attention"],
        },
        kind="moe",
    ),
    "Granite MoE": Base(
        "GraniteMoeConfig",
        (*ATTENTION, EXPERTS),
        {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
        kind="moe",
    ),
    "GLM-4 MoE": Base(
        "Glm4MoeConfig",
        MOE_KINDS,
        {
            "head_dim": 32,
            "moe_intermediate_size": 64,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        kind="moe",
    ),
}

PICTURE_TOKENS = {
    "image_token_id": 6,
    "video_token_id": 7,
    "vision_start_token_id": 8,
    "vision_end_token_id": 9,
}
PICTURE_WORDS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "boi_token": "<|vision_start|>",
    "eoi_token": "<|vision_end|>",
}
NO_PICTURES = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
LANGUAGE = r".*language_model\.layers"
VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 128,
}


def _picture_files(image: str, video: str, processor: str, patch: int) -> dict[str, Any]:
    both = {
        "patch_size": patch,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 1024, "longest_edge": 65536},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "processor_class": processor,
    }
    return {
        "preprocessor_config.json": {"image_processor_type": image, **both},
        "video_preprocessor_config.json": {"video_processor_type": video, **both},
    }


def _qwen_vl(config: str, model: str, processor: str, vision: dict[str, Any]) -> Base:
    text = SIZES | {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}}
    text["rope_parameters"]["rope_theta"] = 10000.0
    return Base(
        config,
        (*ATTENTION, *MLP),
        {"text_config": text, "vision_config": vision, **PICTURE_TOKENS},
        tuple(SIZES),
        kind="vl",
        model=model,
        inside=LANGUAGE,
        old_names=("model.", "language_model.model."),
        files=_picture_files("Qwen2VLImageProcessorFast", "Qwen2VLVideoProcessor", processor, 14),
        engine=NO_PICTURES,
    )


VL_BASES: dict[str, Base] = {
    "Qwen2-VL": _qwen_vl(
        "Qwen2VLConfig",
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLProcessor",
        {"depth": 1, "embed_dim": 32, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2},
    ),
    "Qwen2.5-VL": _qwen_vl(
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLProcessor",
        VISION,
    ),
    "Qwen3.5": Base(
        "Qwen3_5Config",
        (*ATTENTION, *MLP),
        {
            "text_config": SIZES
            | {
                "head_dim": 64,
                "layer_types": ["linear_attention", "full_attention"],
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 64,
                "linear_value_head_dim": 64,
            },
            "vision_config": VISION | {"num_position_embeddings": 16},
            "tie_word_embeddings": False,
            **PICTURE_TOKENS,
        },
        tuple(SIZES),
        close=0.4,  # its engine runs in bfloat16 here
        kind="vl",
        model="Qwen3_5ForConditionalGeneration",
        inside=LANGUAGE,
        files=_picture_files(
            "Qwen2VLImageProcessorFast", "Qwen3VLVideoProcessor", "Qwen3VLProcessor", 16
        ),
        engine={**NO_PICTURES, "dtype": "bfloat16"},
    ),
}

SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 7,
}
CLIP = SIGLIP | {"projection_dim": 32, "patch_size": 14, "model_type": "clip_vision_model"}
ONE_PICTURE = {"limit_mm_per_prompt": {"image": 1, "video": 0}}
TOWER = {"enable_tower_connector_lora": True}
NORMED = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": True}
OLD_TOWER = ("vision_tower.", "vision_tower.vision_model.")
"""What transformers 5 calls the tower, and what the checkpoints of the hub call it."""
GEMMA3_VL = Base(
    "Gemma3Config",
    more={
        "text_config": SIZES | {"head_dim": 32},
        "vision_config": SIGLIP | {"vision_use_head": False},
        "mm_tokens_per_image": 4,
        "image_token_index": 6,
        "boi_token_index": 8,
        "eoi_token_index": 9,
        "initializer_range": 0.08,
    },
    without=tuple(SIZES),
    kind="vl",
    model="Gemma3ForConditionalGeneration",
    inside=LANGUAGE,
    files={
        "preprocessor_config.json": {
            "image_processor_type": "Gemma3ImageProcessor",
            "processor_class": "Gemma3Processor",
            "size": {"height": 56, "width": 56},
            "do_convert_rgb": True,
            **NORMED,
        },
        "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": 4},
    },
    engine={"limit_mm_per_prompt": {"image": 1}},
    picture_prompt=(8,),
    saved_as=OLD_TOWER,
)
LLAVA = Base(
    "LlavaConfig",
    more={
        "text_config": SIZES | {"model_type": "llama"},
        "vision_config": CLIP,
        "image_token_index": 6,
        "image_seq_length": 16,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    },
    without=tuple(SIZES),
    kind="vl",
    model="LlavaForConditionalGeneration",
    inside=LANGUAGE,
    files={
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "size": {"shortest_edge": 56},
            "crop_size": {"height": 56, "width": 56},
            "do_convert_rgb": True,
            **NORMED,
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "patch_size": 14,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
    },
    engine={"limit_mm_per_prompt": {"image": 1}},
    picture_prompt=(6,),
    saved_as=OLD_TOWER,
)
SEEING = {
    name: replace(base, engine=base.engine | ONE_PICTURE, picture_prompt=(8, 6, 9))
    for name, base in VL_BASES.items()
} | {"Gemma3 VL": GEMMA3_VL, "LLaVA": LLAVA}
PICTURE_BASES = {
    f"{name}, {what}": replace(base, engine=base.engine | more)
    for name, base in SEEING.items()
    for what, more in (("text part", {}), ("tower too", TOWER))
}

LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 32,
    "mamba_chunk_size": 32,
}
HYBRID_BASES: dict[str, Base] = {  # Jamba is none of them: CPUs lack its kernel
    "Qwen3-Next": Base(
        "Qwen3NextConfig",
        more={
            "head_dim": 64,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
            "num_experts": 4,
            "num_experts_per_tok": 4,  # bfloat16 would choose others than float32
            "layer_types": ["linear_attention", "full_attention"],
            **LINEAR,
        },
        close=0.4,  # as Qwen3.5
        kind="hybrid",
        engine={"dtype": "bfloat16"},
    ),
    "Granite hybrid": Base(
        "GraniteMoeHybridConfig",
        more={
            **MAMBA,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 64,
            "intermediate_size": 64,
        },
        kind="hybrid",
    ),
    "Falcon-H1": Base("FalconH1Config", more={**MAMBA, "mamba_d_ssm": 256}, kind="hybrid"),
    "Nemotron-H": Base(
        "NemotronHConfig",
        more={
            "layers_block_type": ["mamba", "attention", "mlp"],  # no experts on CPUs
            "head_dim": 32,
            "ssm_state_size": 32,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "n_groups": 1,
            "chunk_size": 32,
            "use_mamba_kernels": False,
        },
        without=("num_hidden_layers",),
        kind="hybrid",
    ),
}

TIED = {"tie_word_embeddings": True}
TIED_BASES: dict[str, Base] = {
    f"{name}, tied": replace(BASES[name], more=BASES[name].more | TIED)
    for name in ("Llama", "Qwen3", "Phi3", "Granite", "Qwen2")
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
    "DeepSeek-V3 MoE": Base(
        "DeepseekV3Config",
        (
            "o_proj",
            EXPERTS,
            ROUTER,
            "shared_experts.gate_proj",
            "shared_experts.down_proj",
            r"layers.0.mlp.up_proj",
        ),
        {**MLA_SIZES, "first_k_dense_replace": 1, "topk_method": "noaux_tc"},
    ),
}


def make_base(base: Base, folder: Path) -> Path:
    """Makes a base with norms that are not one and biases that are not zero, so that
    mistakes show.
    """
    sizes = {k: v for k, v in SIZES.items() if k not in base.without} | base.more
    config = getattr(transformers, base.config)(**sizes)
    torch.manual_seed(1)
    maker = getattr(transformers, base.model)
    made = maker.from_config(config) if base.model.startswith("Auto") else maker(config)
    model = made.float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                start = torch.zeros_like(weight) if "bias" in name else weight
                weight.copy_(start + torch.randn(weight.shape) * 0.05)
            elif float(weight.std()) == 0:  # transformers leaves experts as zeros
                weight.copy_(torch.randn(weight.shape) * 0.08)
    model.save_pretrained(folder)
    if base.saved_as[0]:
        _rename_weights(folder / "model.safetensors", *base.saved_as)
    _tokenizer().save_pretrained(folder)
    for name, content in base.files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def _rename_weights(file: Path, new: str, old: str) -> None:
    tensors = {name.replace(new, old): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def load(base: Base, at: Path) -> Any:
    """The base in float32, with the plainest kernels."""
    if base.model.startswith("Auto"):
        return load_base(str(at))
    maker = getattr(transformers, base.model)
    return maker.from_pretrained(at, dtype=torch.float32, attn_implementation="eager").eval()


def _tokenizer() -> Any:
    known = ["<pad>", "<s>", "</s>", "<unk>", "<a>", "<end>", *PICTURE_WORDS.values()]
    known += sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    known += ["\n" * n for n in range(1, 5)]  # vLLM's Gemma 3 asks for them
    known += [f"w{i}" for i in range(WORDS - len(known))]
    made = tokenizers.Tokenizer(tokenizers.models.BPE({w: i for i, w in enumerate(known)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<end>",
        extra_special_tokens=PICTURE_WORDS,
    )


def layers_as_named() -> None:
    """Makes PEFT adapt the layers that are named. It would take names like up_proj for those of
    experts, in models that have some.
    """
    transformers_weight_conversion.convert_peft_config_for_transformers = lambda *_, **__: None


def make_adapter(base: Base, on: Path, folder: Path, modules: list[str], seed: int) -> None:
    """Makes an adapter as if it were trained. PEFT would begin with zeros, which change nothing."""
    layers_as_named()
    plain = load(base, on)
    experts = EXPERTS in modules or PER_EXPERT in modules
    more: dict[str, Any] = {"target_modules": base.targets(modules)}
    if experts:
        more = {"target_modules": [], "target_parameters": _expert_tensors(plain)}
    elif ROUTER in modules:
        more = {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}
    config = peft.LoraConfig(r=RANK, lora_alpha=16, task_type="CAUSAL_LM", **more)
    model = peft.get_peft_model(plain, config)
    fill(model, seed, 0.05 if experts else 0.2)
    model.save_pretrained(folder)


def fill(model: Any, seed: int, scale: float = 0.2) -> None:
    """Trained-looking values in place of PEFT's zeros."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            begins_as_zeros = "lora_B" in name or "lora_embedding_A" in name
            if begins_as_zeros or ("lora_A" in name and not weight.any()):
                weight.copy_(torch.randn(weight.shape) * scale)


def _expert_tensors(model: Any) -> list[str]:
    """The 3D weights of the experts, as target_parameters names them."""
    found = {".".join(n.split(".")[-2:]) for n, p in model.named_parameters() if p.dim() == 3}
    return sorted(n for n in found if n.startswith("experts."))


def rename(folder: Path, into: Path, new: str, old: str) -> None:
    """Copies an adapter with other names of its layers."""
    shutil.copytree(folder, into)
    file = into / "adapter_model.safetensors"
    tensors = {name.replace(new, old): t for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((into / "adapter_config.json").read_text())
    config["target_modules"] = sorted({name.split(".")[-3] for name in tensors})
    (into / "adapter_config.json").write_text(json.dumps(config))


def split_experts(folder: Path, into: Path, names: tuple[str, str, str]) -> None:
    """Copies an adapter of experts with a pair of tensors for each expert. `names` are those of the
    gate's, the up and the down projection. PEFT keeps A as experts x rank, and B with the expert as
    its fastest index.
    """
    shutil.copytree(folder, into)
    file = into / "adapter_model.safetensors"
    fused, split = load_file(file), {}
    for name, a in fused.items():
        layer, found, _ = name.partition(".lora_A.weight")
        if not found:
            continue
        experts = layer.removesuffix(".base_layer")
        count = a.shape[0] // RANK
        b = fused[f"{layer}.lora_B.weight"].reshape(-1, RANK, count)
        for expert in range(count):
            mine_a, mine_b = a[expert * RANK : (expert + 1) * RANK], b[:, :, expert]
            gate, up = mine_b.chunk(2)
            parts = {names[2]: mine_b} if experts == layer else {names[0]: gate, names[1]: up}
            for part, weight in parts.items():
                at = f"{experts}.{expert}.{part}"
                split[f"{at}.lora_A.weight"] = mine_a.contiguous().clone()
                split[f"{at}.lora_B.weight"] = weight.contiguous().clone()
    save_file(split, file, metadata={"format": "pt"})
    config = json.loads((into / "adapter_config.json").read_text())
    config |= {"target_parameters": None, "target_modules": list(names)}
    (into / "adapter_config.json").write_text(json.dumps(config))
