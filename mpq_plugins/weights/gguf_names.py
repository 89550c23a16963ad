"""What of a GGUF file llama.cpp keeps in floating point, whatever its quantizer is asked, by the names files have."""

import re

KEPT = re.compile(
    r"_norm$|ffn_gate_(inp|tid2eid)$|(^|\.)(altup|laurel)_|per_layer_model_proj$|^position_embd$|^token_types$"
    r"|ssm_conv1d|shortconv\.conv$|indexer\.[kq]_proj$|attn_rel_b$|time_mix_(first|decay_w[12]|lerp_fused|[wva][012]|g[12])$"
    r"|\.position_embd|sam\.(pos_embd|neck\.|net_)|\.rel_pos|\.patch_(embd|merger)|a\.rvq\.codebook|mm\.a\.code_embd"
)
"""As llama-quantize looks for them: norms, routers, short convolutions, small tables and gates, positions, patches."""


def kept_by_llama_cpp(layer: str) -> bool:
    """Whether llama-quantize leaves a layer of this name, without `.weight`, in floating point in silence."""
    return KEPT.search(layer) is not None
