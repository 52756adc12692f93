"""Small models with random weights, one for each convention that the integration has to recognise."""

import copy

import torch
from torch.overrides import TorchFunctionMode

V = 89
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}


def config_of(name: str):
    import transformers as hf

    common = {**SIZES, **HEADS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
    routed = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
    return {
        "llama": lambda: hf.LlamaConfig(**common),
        "qwen3": lambda: hf.Qwen3Config(**common, head_dim=8),
        "gemma": lambda: hf.GemmaConfig(**common, head_dim=8),
        "gemma2": lambda: hf.Gemma2Config(**common, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
        "mistral": lambda: hf.MistralConfig(**common, sliding_window=16),
        "mixtral": lambda: hf.MixtralConfig(**common, num_local_experts=4, num_experts_per_tok=2, sliding_window=6),
        "qwen3_moe": lambda: hf.Qwen3MoeConfig(**common, **EXPERTS, head_dim=8, num_experts=4),
        "deepseek_v3": lambda: hf.DeepseekV3Config(
            **{**common, "num_key_value_heads": 4}, **EXPERTS, **latent, **routed
        ),
        "nemotron": lambda: hf.NemotronConfig(**common, head_dim=8),
        "granite": lambda: hf.GraniteConfig(**common, logits_scaling=3.0),
    }[name]()


def model_of(name: str, seed: int = 0):
    import transformers as hf

    torch.manual_seed(seed)
    attention = "eager" if name == "gemma2" else "sdpa"  # for its softcap
    model = hf.AutoModelForCausalLM.from_config(config_of(name), attn_implementation=attention).eval()
    with torch.no_grad():  # weights that are all one, or zero, would hide a wrong convention
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


class InFloat64(TorchFunctionMode):
    """Casts to float32 that a model's code spells out become casts to float64: its formula, exactly."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


def truth_of(model, batch):
    """What the model computes in float64."""
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")  # PyTorch's grouped product takes no float64
    with InFloat64():
        return results_of(exact, batch)


def batch_of(kind: str, length: int = 13):
    """A plain batch, one padded on both sides, or one row of packed documents; labels ignore what is padding."""
    ids = torch.randint(3, V, (2, length), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    if kind == "plain":
        return {"input_ids": ids, "labels": labels}
    if kind == "padded":
        real = torch.ones_like(ids)
        real[0, :4] = 0
        real[1, -3:] = 0
        labels[real == 0] = -100
        labels[0, 4] = -100  # it is predicted by padding
        return {"input_ids": ids, "labels": labels, "attention_mask": real}
    positions = torch.cat([torch.arange(n) for n in (5, 1, length - 6)])
    labels[:, positions == 0] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": positions.expand(2, -1)}


def results_of(model, batch):
    """Logits where a token is real, loss and gradients, by name."""
    model.zero_grad()
    out = model(**batch, use_cache=False)
    out.loss.backward()
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    found = {"logits": out.logits.detach()[real], "loss": out.loss.detach()}
    return found | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
