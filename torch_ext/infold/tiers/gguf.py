"""What llama.cpp calls the parameters of models of the Llama family."""

from __future__ import annotations

import re

_MODEL = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(parameter: str) -> str:
    """The GGUF tensor of a parameter by its name in transformers' Llama, Mistral, Qwen2, Qwen3 and SmolLM models.

    Raises ValueError for any other name.
    """
    module, _, kind = parameter.rpartition(".")
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    name = f"blk.{block[1]}.{_BLOCK[block[2]]}" if block and block[2] in _BLOCK else _MODEL.get(module)
    if name is None or kind not in ("weight", "bias"):
        raise ValueError(f"parameter: expected one of a Llama-style model, got {parameter!r}")
    return f"{name}.{kind}"
