"""Writes engine_random.json: logits of small random models in transformers, float32, for the safetensors loader's tests.

Weights come from a counter-based generator that crates/engine/tests/common/random_model.rs repeats: element i of tensor NAME is
made of splitmix64(fnv1a64(NAME) + (i + 1) * 0x9E3779B97F4A7C15).

    python engine_random.py
"""

import json
import math
import os
import tempfile

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

HERE = os.path.dirname(os.path.abspath(__file__))
POSITIONS = [0, 7, 22, 39]
TOKENS = [(i * i * 31 + i * 7 + 3) % 256 for i in range(40)]

BASE = {
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 256,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = [
    ("llama with llama3 rope", "f32", 1, {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 10000.0, "rope_scaling": LLAMA3,
    }),
    ("llama tied, linear rope, two files", "bf16", 2, {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True, "num_hidden_layers": 3,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0},
    }),
    ("qwen2 with odd sizes", "f16", 1, {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 72, "num_attention_heads": 3,
        "num_key_value_heads": 1, "intermediate_size": 100, "rope_theta": 10000.0, "eos_token_id": [2, 5],
        "use_sliding_window": False, "vocab_size": 250,
    }),
    ("qwen3 tied, wide heads", "f32", 1, {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True,
        "num_hidden_layers": 3, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "attention_bias": False,
    }),
]
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def fnv1a(name):
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = ((h ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return h


def weights(name, shape):
    count = math.prod(shape)
    with np.errstate(over="ignore"):
        z = np.uint64(fnv1a(name)) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    u = (z >> np.uint64(40)).astype(np.float32) / np.float32(2**24) - np.float32(0.5)
    if name.endswith("norm.weight"):
        x = np.float32(1.0) + u * np.float32(0.5)
    elif name.endswith(".bias"):
        x = u * np.float32(0.5)
    else:
        x = u * np.float32(4.0 / math.sqrt(shape[-1]))
    return torch.from_numpy(x.reshape(shape))


def main():
    out = []
    for label, dtype, files, changes in MODELS:
        config = BASE | changes
        tokens = [token % config["vocab_size"] for token in TOKENS]
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "config.json"), "w") as file:
                json.dump(config, file)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="eager")
        model = model.float().eval()
        state = {name: weights(name, t.shape).to(DTYPES[dtype]).float() for name, t in model.state_dict().items()}
        if config["tie_word_embeddings"]:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state)
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0]
        names = [[n, list(t.shape)] for n, t in model.state_dict().items()
                 if not (config["tie_word_embeddings"] and n == "lm_head.weight")]
        out.append({
            "label": label, "config": config, "dtype": dtype, "files": files, "tensors": names, "tokens": tokens,
            "rows": [{"position": p, "logits": [round(float(x), 6) for x in logits[p]]} for p in POSITIONS],
        })
        print(label, model.config.rope_parameters, "logits", float(logits.min()), float(logits.max()))
    with open(os.path.join(HERE, "engine_random.json"), "w") as file:
        json.dump(out, file, separators=(",", ":"))


main()
