"""Writes engine_logits.json: what transformers computes in float32 for a GGUF file's weights, dequantised.

Twenty prompts: token ids, and for the last position the 64 best logits, some fixed ones, and sum and sum of squares of the row.
And the mean negative log-likelihood of each next token of a text of 2,000 tokens (`engine_text.txt`: public-domain texts of 1776 and 1863, then prose of our own).

    python engine_logits.py MODEL.gguf
"""

import json
import os
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
FIXED = [0, 1, 2, 17, 198, 1000, 7777, 12345, 20202, 31415, 40000, 49151]

ENGLISH = open(os.path.join(HERE, "engine_text.txt"), encoding="utf-8").read()
PROMPTS = [
    ("one token", "The"),
    ("english short", "The capital of France is"),
    ("english question", "Why is the sky blue?"),
    ("english story", "Once upon a time, in a village between two rivers, there lived a clockmaker who"),
    ("english numbers", "The first ten primes are 2, 3, 5, 7, 11, 13,"),
    ("english list", "Shopping list:\n- two apples\n- a loaf of bread\n-"),
    ("english 100", ENGLISH[:480]),
    ("english 200", ENGLISH[1000:1950]),
    ("chinese short", "你好，世界"),
    ("chinese question", "天空为什么是蓝色的？请用一句话回答。"),
    ("chinese passage", "春天来了，小镇上的河水慢慢变暖。孩子们在桥上放风筝，老人坐在树下喝茶，谈论去年的收成。"),
    ("japanese", "東京の朝は早い。電車が動き出す前に、"),
    ("code python", "def fibonacci(n):\n    if n < 2:\n        return n\n    return"),
    ("code rust", "fn main() {\n    let numbers = vec![1, 2, 3];\n    for n in &numbers {\n        println!(\"{}\","),
    ("code json", "{\"name\": \"baton\", \"version\": \"0.1.0\", \"roles\": [\"prefill\", \"decode\","),
    ("code sql", "SELECT name, COUNT(*) FROM orders WHERE price > 100 GROUP BY"),
    ("emoji", "I am so happy today 😀🎉🚀"),
    ("emoji mixed", "🐱 is a cat, 🐶 is a dog, and 🦜 is a"),
    ("chat", "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n"),
    ("accents and symbols", "Größe ≥ 5 µm, naïve café, ½ × π ≈ 1,57 — „ja“"),
]


def main():
    path = os.path.abspath(sys.argv[1])
    folder, name = os.path.split(path)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    prompts = []
    with torch.no_grad():
        for label, text in PROMPTS:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            row = model(torch.tensor([ids])).logits[0, -1].double()
            best = torch.topk(row, 64)
            prompts.append({
                "label": label,
                "tokens": ids,
                "top": [[int(i), round(float(x), 5)] for i, x in zip(best.indices, best.values)],
                "fixed": [[i, round(float(row[i]), 5)] for i in FIXED],
                "mean": round(float(row.mean()), 6),
                "mean_square": round(float((row * row).mean()), 6),
            })
        ids = tokenizer(ENGLISH, add_special_tokens=False)["input_ids"][:2000]
        assert len(ids) == 2000, len(ids)
        logits = model(torch.tensor([ids])).logits[0]
        nll = torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:]), reduction="none")
    out = {
        "model": name,
        "reference": f"transformers, float32, torch {torch.__version__.split('+')[0]}",
        "prompts": prompts,
        "text": {
            "tokens": ids,
            "nll": round(float(nll.mean()), 6),
            "nll_by_250": [round(float(x.mean()), 6) for x in nll.split(250)],
        },
    }
    with open(os.path.join(HERE, "engine_logits.json"), "w", encoding="utf-8") as file:
        json.dump(out, file, ensure_ascii=False, separators=(",", ":"))
    print(len(prompts), "prompts, nll", out["text"]["nll"], "lengths", [len(p["tokens"]) for p in prompts])


main()
