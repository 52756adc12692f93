"""Every decoder, encoder and encoder-decoder of the installed Transformers, as small as its configuration allows.

The list is the library's own registry.  One table gives small values to configuration fields by name; a model whose
configuration needs more than that has a line in ``MORE``.
"""

import dataclasses
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError

from kernel_index.integrations.hugging_face.change import RAISED

V = 89
MOST_PARAMETERS = 3_000_000
KINDS = {
    "decoder": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "encoder": "MODEL_FOR_MASKED_LM_MAPPING",
    "encoder-decoder": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
}


def _all(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SMALL = {
    **_all(
        V, "vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size vocab_size_per_layer_input entity_vocab_size"
    ),
    **_all(32, "hidden_size d_model n_embd embedding_size emb_dim dim d_embed embed_dim d_latents linear_key_dim"),
    **_all(32, "hidden_size_per_layer_input entity_emb_size backbone_hidden_size dim_model_base true_hidden_size"),
    **_all(48, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff dim_ff dff hidden_dim d_inner n_inner"),
    **_all(48, "intermediate_size_mlp ffn_hidden_size dense_intermediate_size prompt_mid_dim feed_forward_size"),
    **_all(24, "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size"),
    **_all(24, "moe_shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size"),
    **_all(2, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers"),
    **_all(2, "num_encoder_layers num_blocks num_self_attends_per_block"),
    **_all(4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
    **_all(4, "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads"),
    **_all(2, "num_key_value_heads swa_num_key_value_heads num_self_attention_heads num_cross_attention_heads"),
    **_all(8, "head_dim swa_head_dim d_kv dim_head d_head kv_channels global_head_dim attention_head_dim"),
    **_all(4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    **_all(2, "num_experts_per_tok moe_topk moe_k experts_per_token top_k_experts moe_top_k"),
    **_all(2, "n_group"),
    **_all(1, "topk_group n_shared_experts num_shared_experts moe_num_shared_experts num_mtp_layers"),
    **_all(1, "first_k_dense_replace num_dense_layers moe_layer_start_index"),
    **_all(16, "q_lora_rank kv_lora_rank o_lora_rank laurel_rank gated_norm_rank hc_lowrank embedding_rank"),
    **_all(4, "qk_rope_head_dim rotary_dim index_topk"),
    **_all(8, "qk_nope_head_dim v_head_dim index_head_dim query_pre_attn_scalar"),
    **_all(2, "index_n_heads o_groups"),
    **_all(6, "sliding_window local_attention window_size sliding_window_size attention_chunk_size"),
    **_all(8, "mamba_d_head mamba_head_dim mamba_num_heads mamba_n_heads n_mamba_heads linear_key_head_dim"),
    **_all(8, "linear_value_head_dim linear_head_dim"),
    **_all(16, "mamba_d_state state_size ssm_state_size mamba_d_ssm"),
    **_all(8, "mamba_chunk_size chunk_size"),
    **_all(1, "mamba_n_groups n_groups mamba_ngroups"),
    **_all(2, "linear_num_key_heads linear_num_value_heads linear_num_heads num_kv_shared_layers"),
    **_all(64, "max_position_embeddings n_positions n_ctx max_seq_len max_source_positions max_target_positions"),
    **_all(64, "max_encoder_position_embeddings max_decoder_position_embeddings d_inner_max"),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
OFF = {  # chance would make two runs differ
    **_all(0.0, "dropout attention_dropout activation_dropout hidden_dropout_prob attention_probs_dropout_prob"),
    **_all(0.0, "resid_pdrop embd_pdrop attn_pdrop hidden_dropout classifier_dropout dropout_rate layerdrop"),
    **_all(0.0, "encoder_layerdrop decoder_layerdrop embedding_dropout residual_dropout"),
}
LATENT = {"num_key_value_heads": 4}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
SHARED_NOT = {"num_kv_shared_layers": 0}
MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"), LATENT
    ),
    **dict.fromkeys(("minicpm3", "youtu", "dots3_note_text", "esmc"), LATENT),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text"), HYBRID),
    **dict.fromkeys(("bailing_hybrid",), HYBRID | LATENT),
    **dict.fromkeys(("gemma3n_text", "gemma4_text", "gemma4_unified_text"), SHARED_NOT),
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 6},
    "xlstm": {"head_dim": 8, "qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {"num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
    "led": {"attention_window": [6, 6]},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "is_decoder": True},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "neomme": {"head_dim": 16},
    "longcat_flash": LATENT | {"head_dim": 4},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "kimi_linear": HYBRID | LATENT,
    "cohere_compass_text": {"layer_types": ["full_attention", "full_attention"]},
    "gemma4_assistant": {"text_config": SHARED_NOT | {"hidden_size_per_layer_input": 0}},
    "gemma4_unified_assistant": {"text_config": SHARED_NOT | {"hidden_size_per_layer_input": 0}},
    "roc_bert": {
        "pronunciation_vocab_size": V,
        "shape_vocab_size": V,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
}
"""What a type needs beside ``SMALL``: sizes that depend on each other, and one layer of each kind in a hybrid."""
TRAINED_ALONE = ("forced_bos_token_id", "forced_eos_token_id", "sep_token_id", "mask_token_id", "cls_token_id")


class CannotBeBuilt(Exception):
    """The reason, in its text, why there is no small model of this type."""


class Known(NamedTuple):
    kind: str
    model_type: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.model_type}"


def registry() -> list[Known]:
    """Every model type that the installed Transformers registers for one of the kinds."""
    from transformers.models.auto import modeling_auto

    return [
        Known(kind, model_type)
        for kind, mapping in KINDS.items()
        for model_type in sorted(getattr(modeling_auto, f"{mapping}_NAMES"))
    ]


def config_of(known: Known) -> Any:
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[known.model_type]
    with quiet():
        return _config(cls, MORE.get(known.model_type, {}))


def _config(cls: Any, more: dict[str, Any]) -> Any:
    if not dataclasses.is_dataclass(cls):
        raise CannotBeBuilt("its configuration is no dataclass")
    fields = {f.name for f in dataclasses.fields(cls)}
    given = {n: v for n, v in (SMALL | OFF).items() if n in fields}
    for name, part in (cls.sub_configs or {}).items():
        if dataclasses.is_dataclass(part) and name in fields:
            given[name] = _config(part, {**MORE.get(part.model_type, {}), **more.get(name, {})})
    for name in TRAINED_ALONE:
        if name in fields and isinstance(getattr(cls, name, None), int):
            given[name] = 2
    return cls(**{**given, **_own(more)})


def _own(more: dict[str, Any]) -> dict[str, Any]:
    """What belongs to a configuration itself and not to a part of it."""
    return {n: v for n, v in more.items() if not isinstance(v, dict)}


def class_of(known: Known) -> Any:
    from transformers.models.auto import modeling_auto

    cls = getattr(modeling_auto, KINDS[known.kind])[type(config_of(known))]
    return cls[0] if isinstance(cls, tuple) else cls


def model_of(known: Known, seed: int = 0) -> Any:
    """The model with random weights of which none is all one or zero: these would hide a wrong convention."""
    try:
        with quiet():
            model = _built(known, seed)
    except CannotBeBuilt:
        raise
    except (
        StrictDataclassError,
        *RAISED,
    ) as error:  # a registered type may need another package, or sizes that depend on each other
        line = str(error).strip().split("\n")[0][:160]
        raise CannotBeBuilt(f"{type(error).__name__}: {line}") from error
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.is_floating_point():
                parameter.mul_(3)
    return model


def _built(known: Known, seed: int) -> Any:
    cls, config = class_of(known), config_of(known)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in cls(config_of(known)).parameters())
    if parameters > MOST_PARAMETERS:
        raise CannotBeBuilt(f"has {parameters:,} parameters")
    torch.manual_seed(seed)
    return cls(config).eval()


@contextmanager
def quiet() -> Iterator[None]:
    from transformers.utils import logging as hf_logging

    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    hf_logging.set_verbosity(before)
