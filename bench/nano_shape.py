"""The shape that the spine's comparisons use, as one Llama checkpoint that both sides load."""

from __future__ import annotations

from pathlib import Path

VOCAB, SEQ_LEN, ROWS = 8192, 512, 16

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 704,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def save_checkpoint(folder: Path) -> None:
    """Random weights, the same on every call."""
    from puyu.model.checkpoint import save_model
    from puyu.model.config import ModelConfig
    from puyu.model.heads import CausalLM
    from puyu.model.init import init_weights

    model = CausalLM(ModelConfig.from_hf(CONFIG))
    init_weights(model, seed=0)
    save_model(model, folder)
