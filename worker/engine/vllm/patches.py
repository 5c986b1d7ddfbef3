"""Shell. Corrections of vLLM 0.32 that Loraplex needs, applied in every process that runs the
model.

Each docstring says what goes wrong without the correction. A correction is harmless where vLLM is
right already. For each there is a test on the real engine that fails without it.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

from worker.engine.vllm.boot import stages
from worker.engine.vllm.grammars import metering
from worker.engine.vllm.lora import files as adapter_files
from worker.engine.vllm.resume import engine_core


def apply() -> None:
    """Applies all corrections to this process."""
    from vllm.platforms import current_platform

    _leave_no_temporary_files()
    stages.install()
    adapter_files.install()
    metering.install()
    engine_core.install()
    _second_names_take_adapters()
    _towers_count_all_their_tokens()
    _fused_layers_may_lack_their_first_part()
    if current_platform.is_cpu():
        from worker.engine.vllm.lora import cpu_experts, cpu_lora

        _base_rows_stay_base()
        _seeds_survive_chunked_prompts()
        _prompts_are_scored_with_their_own_adapter()
        cpu_experts.install()
        cpu_lora.install()
    elif current_platform.is_cuda():
        from worker.engine.vllm.lora import gpu_lora

        gpu_lora.install()


def _leave_no_temporary_files() -> None:
    """Puts them beside vLLM's sockets, in a folder that is removed whatever ends this process.

    vLLM removes them itself at its end, but not if it is killed while it starts. What torch has
    compiled stays where it is, for the next start.
    """
    folder = os.environ.get("VLLM_RPC_BASE_PATH")
    if folder is None or not os.path.isdir(folder):
        return
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    cache_dir()  # it writes its place into the environment
    tempfile.tempdir = folder


def _second_names_take_adapters() -> None:
    """Lets a layer that the model holds under a second name use the adapter of its first name.

    vLLM gives LoRA to the layer at its first name. It looks for second names while it does so, but
    not below its own LoRA layers, and not for last parts that no first name has. Examples are the
    router inside of a layer of experts, and the gate of a shared expert inside of that expert
    (Qwen2 MoE, Qwen3-Next). There the model goes on with the plain layer, and an adapter of it
    answers like the base, without an error. Embeddings are left out: a head that is tied to one is
    not adapted with it.
    """
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.model_manager import LoRAModelManager

    original = LoRAModelManager._create_lora_modules
    if getattr(original, "loraplex", False):
        return

    def create_lora_modules(manager: Any) -> None:
        original(manager)
        adapted = {
            id(module.base_layer): module
            for module in manager.modules.values()
            if isinstance(module, BaseLinearLayerWithLoRA)
        }
        for parent in list(manager.model.modules()):
            for name, child in list(parent._modules.items()):
                layer = adapted.get(id(child))
                if layer is not None and layer is not parent:
                    setattr(parent, name, layer)

    create_lora_modules.loraplex = True  # type: ignore[attr-defined]
    LoRAModelManager._create_lora_modules = create_lora_modules


def _towers_count_all_their_tokens() -> None:
    """Gives each token of LLaVA's vision tower the adapter of its own picture.

    The tower (CLIP) puts a token of its own before those of each picture. The projector does not
    get it, and vLLM counts without it. So each picture of a batch begins one token further behind
    its adapter than the picture before. On CPUs EngineCore ends with the first picture.
    """
    from vllm.lora.model_manager import LoRAModelManager

    original = LoRAModelManager._maybe_init_mm
    if getattr(original, "loraplex", False):
        return

    def _maybe_init_mm(manager: Any, *args: Any) -> None:
        for kind in type(manager.model).__mro__:
            if kind.__name__ == "LlavaForConditionalGeneration":
                kind.get_mm_lora_token_counts = _llava_token_counts  # type: ignore[attr-defined]
        original(manager, *args)

    _maybe_init_mm.loraplex = True  # type: ignore[attr-defined]
    LoRAModelManager._maybe_init_mm = _maybe_init_mm


def _llava_token_counts(
    self: Any, *, modality: str, mm_kwargs: Any, num_mm_embeds: int
) -> tuple[int, int]:
    """(tokens in the tower, tokens in the projector)"""
    if self.config.vision_feature_select_strategy != "default":  # it drops the first of a picture
        return num_mm_embeds, num_mm_embeds
    vision = self.config.vision_config
    of_picture = (vision.image_size // vision.patch_size) ** 2
    in_tower = of_picture + (vision.model_type == "clip_vision_model")
    pictures = -(-num_mm_embeds // (in_tower - 1))
    return pictures * in_tower, num_mm_embeds


def _fused_layers_may_lack_their_first_part() -> None:
    """Serves adapters of `in_proj_z` alone (Qwen3.5).

    vLLM has `in_proj_qkv` and `in_proj_z` as one layer of four parts. Where the first is not
    adapted, it takes all four parts for the first's, and has no part left for the second. So a good
    adapter is refused. Each further one has one part.
    """
    from vllm.lora.layers import MergedColumnParallelLinearWithLoRA as Fused

    original = Fused.expand_packed_lora
    if getattr(original, "loraplex", False):
        return

    def expand_packed_lora(self: Any, lora_a: list[Any], lora_b: list[Any]) -> Any:
        if lora_b[0] is not None:
            return original(self, lora_a, lora_b)
        without = [None] * (self.n_slices - len(lora_b) + 1)
        return without + lora_a[1:], without + lora_b[1:]

    expand_packed_lora.loraplex = True  # type: ignore[attr-defined]
    Fused.expand_packed_lora = expand_packed_lora


def _base_rows_stay_base() -> None:
    """Keeps rows of the base model free of adapters on CPUs.

    vLLM's CPU kernels take the slot of a token as an index, and a token of the base model has slot
    -1. In Python that selects the LAST slot. So a base request that shares a batch with an
    adapter's request is answered with the weights of whatever adapter is in the last slot. The GPU
    kernels skip such tokens (vllm-project/vllm pull requests 48421 and 49656, open at the time of
    writing).

    Linear layers have kernels of their own (cpu_lora.py). For the others the result of the shrink
    is set to zero, so the expand adds zero.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    original = lora_ops.bgmv_shrink
    if getattr(original, "loraplex", False):
        return

    def bgmv_shrink(
        inputs: Any,
        lora_b_weights: Any,
        output_tensor: Any,
        lora_indices_tensor: Any,
        scaling: float = 1.0,
    ) -> None:
        original(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)
        output_tensor.masked_fill_((lora_indices_tensor < 0).unsqueeze(1), 0)

    bgmv_shrink.loraplex = True  # type: ignore[attr-defined]
    lora_ops.bgmv_shrink = bgmv_shrink  # the prefill's sgmv_shrink finds it by this name
    punica_cpu.bgmv_shrink = bgmv_shrink


def _seeds_survive_chunked_prompts() -> None:
    """Keeps the engine alive on CPUs when the prompt of a request with a seed takes several steps.

    vLLM samples a token after each step of the prompt, throws it away, and turns the request's
    generator back by one draw. It does so with an offset, which generators have on GPUs alone. On
    CPUs that raises, and EngineCore ends with all requests. Here the generator gets back the state
    that it had before the draw.
    """
    import numpy as np
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    sample, keep_books = GPUModelRunner._sample, GPUModelRunner._bookkeeping_sync
    if getattr(sample, "loraplex", False):
        return

    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        rows = np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0]
        drawn_in_vain = [generators[row] for row in rows.tolist() if row in generators]
        before = [generator.get_state() for generator in drawn_in_vain]
        sampled = sample(self, *args, **kwargs)
        for generator, state in zip(drawn_in_vain, before, strict=True):
            generator.set_state(state)
        return sampled

    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        generators, batch.generators = batch.generators, {}
        try:
            return keep_books(self, *args, **kwargs)
        finally:
            batch.generators = generators

    _sample.loraplex = True  # type: ignore[attr-defined]
    GPUModelRunner._sample, GPUModelRunner._bookkeeping_sync = _sample, _bookkeeping_sync


def _prompts_are_scored_with_their_own_adapter() -> None:
    """Keeps the engine alive on CPUs when a prompt's log probabilities are asked for beside another
    request.

    vLLM computes the logits of all tokens of a prompt with the slots of the rows that it samples,
    one for each request. On CPUs that raises unless there is one request only, and EngineCore ends.
    Here the tokens of a prompt have the slot of their request.
    """
    from vllm.lora.punica_wrapper import punica_cpu
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    score = GPUModelRunner._get_prompt_logprobs_dict
    if getattr(score, "loraplex", False):
        return
    scored: list[slice] = []  # the tokens of the step whose logits are computed now, if any

    def _get_prompt_logprobs_dict(self: Any, hidden_states: Any, *args: Any) -> Any:
        if not self.num_prompt_logprobs:
            return {}
        compute = self.model.compute_logits
        row_bytes = hidden_states.stride(0) * hidden_states.element_size()

        def compute_logits(rows: Any) -> Any:
            first = (rows.data_ptr() - hidden_states.data_ptr()) // row_bytes
            scored.append(slice(first, first + rows.size(0)))
            try:
                return compute(rows)
            finally:
                scored.clear()

        self.model.compute_logits = compute_logits
        try:
            return score(self, hidden_states, *args)
        finally:
            del self.model.compute_logits

    _get_prompt_logprobs_dict.loraplex = True  # type: ignore[attr-defined]
    GPUModelRunner._get_prompt_logprobs_dict = _get_prompt_logprobs_dict
    punica_cpu.PunicaWrapperCPU.add_lora_logits = _logits_with_slots_of(scored)


def _logits_with_slots_of(scored: list[slice]) -> Any:
    """vLLM's function for the logits of adapters, which takes the slots of the tokens in `scored`
    where there are some.
    """
    import torch
    from vllm.lora.punica_wrapper import punica_cpu

    sample_logits = punica_cpu.PunicaWrapperCPU.add_lora_logits

    def add_lora_logits(
        self: Any, y: Any, x: Any, lora_a: Any, lora_b: Any, scale: float, **more: Any
    ) -> None:
        if not scored:
            sample_logits(self, y, x, lora_a, lora_b, scale, **more)
            return
        slots = self.token_lora_indices[scored[0]]
        shrunk = y.new_zeros((x.size(0), lora_b.size(-1)), dtype=torch.float32)
        punica_cpu.bgmv_shrink(x, lora_a, shrunk, slots, scale)
        punica_cpu.bgmv_expand(shrunk, lora_b, y, slots, add_inputs=True)

    return add_lora_logits
