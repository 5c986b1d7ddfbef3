"""Shell. Experts that take adapters, on CPUs. vLLM 0.32 has kernels for them on GPUs alone.

vLLM's own LoRA layer for experts places an adapter's weights, as on a GPU. The arithmetic is in
cpu_experts_kernel.py, which is imported only where an engine asks for it.
"""

from __future__ import annotations

from typing import Any


def experts_class() -> Any:
    """The class. vLLM is imported only when an engine asks for it."""
    from worker.engine.vllm.lora.cpu_experts_kernel import CpuExpertsWithLora

    return CpuExpertsWithLora


def install() -> None:
    """Lets unquantized experts take adapters in this process. Experts of other kinds stay out of
    LoRA: vLLM's layer would call Triton's kernels for them, also for requests without an adapter,
    and the engine would die with the first one. A second call does nothing.
    """
    from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    if getattr(unquantized, "loraplex", False):
        return
    unquantized.loraplex = True
    post_init, kernels = FusedMoEConfig.__post_init__, unquantized.backend_to_kernel_cls

    def without_triton(config: Any) -> None:
        config.is_lora_enabled = False  # else the kernels of the experts would be Triton's
        post_init(config)

    def kernels_with_lora(backend: Any) -> Any:
        more = [experts_class()] if backend is unquantized.UnquantizedMoeBackend.CPU else []
        return [*more, *kernels(backend)]

    FusedMoEConfig.__post_init__ = without_triton
    unquantized.backend_to_kernel_cls = kernels_with_lora
    for layer in (FusedMoEWithLoRA, FusedMoE3DWithLoRA):
        layer.can_replace_layer = classmethod(_only_ours(layer.can_replace_layer.__func__))


def _only_ours(original: Any) -> Any:
    def can_replace_layer(cls: Any, source_layer: Any, *args: Any, **named: Any) -> bool:
        return bool(original(cls, source_layer, *args, **named)) and takes_adapters(source_layer)

    return can_replace_layer


def takes_adapters(layer: Any) -> bool:
    """Whether the experts of this layer (vLLM's MoERunner) are computed here."""
    kernel = getattr(layer.routed_experts.quant_method, "moe_kernel", None)
    return isinstance(getattr(kernel, "fused_experts", None), experts_class())
