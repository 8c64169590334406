#!/usr/bin/env python3
"""Writes tokenizer_ids.jsonl: 1,000 strings and the token ids that llama.cpp gives them, one JSON object a line.

usage: tokenizer_llama_cpp.py MODEL.gguf > tokenizer_ids.jsonl
needs: pip install llama-cpp-python==0.3.36   (compiles llama.cpp; only its vocabulary is loaded)

The strings are made from a fixed seed and are checked in with the ids, so that the test needs none of this.
"""
import json
import random
import sys

from llama_cpp import Llama

ENGLISH = """The quick brown fox jumps over the lazy dog. It's what we'd've called "unlikely", wasn't it? I'll say they're
right: you've seen Mr. O'Neill's co-operative; re-read e.g. chapter 3 (pp. 45-67), won't you? WE'RE SHOUTING, DON'T YOU'LL HEAR?
Prefill computes keys and values for every prompt token; decode appends one token at a time and reads them all again.""".split()
CODE = ["def f(x: int) -> str:\n    return f\"{x!r:>10}\"\n", "for (int i = 0; i < n; ++i) { a[i] += b[i] * 2; }\n", "\tif err != nil {\n\t\treturn err\n\t}\n",
        "let v: Vec<&'a str> = s.split(\"::\").collect();", "SELECT * FROM t WHERE a <> 'it''s' AND b >= 1e-3;", "<div class=\"x\">&nbsp;</div>", "#include <stdio.h>\r\n\r\nint main(void){return 0;}\r\n",
        "x = {'a': [1, 2, 3], \"b\": None}  # comment", "a_b_c__d$HOME/../file.tar.gz --flag=value 2>&1 | grep -v '^#'", "λ x → x ≤ 3 ∧ ¬y ⇒ ∀z∈ℕ", "```rust\nfn main() {}\n```\n", "https://example.com/a?b=c&d=%20#e"]
CHINESE = "天空为什么是蓝色的？因为大气分子对太阳光的散射作用，波长较短的蓝光被散射得更多。繁體中文與簡體中文，「引號」《書名》……——·"
JAPANESE = "空はなぜ青いのですか？カタカナとひらがな、漢字が混ざった文章です。ー〜・「」ｱｲｳ①②㍿"
KOREAN = "하늘은 왜 파란가요? 한국어 문장입니다."
ARABIC = "لماذا السماء زرقاء؟ هذا نصٌّ عربيّ مُشَكَّل، ١٢٣٤٥ ﷺ"
OTHERS = ["Почему небо голубое? Ёлка, ъ.", "Γιατί ο ουρανός είναι μπλε; ΆΈΉ", "आसमान नीला क्यों है? क्षत्रिय १२३", "ทำไมท้องฟ้าถึงเป็นสีฟ้า", "למה השמיים כחולים? שָׁלוֹם", "Tại sao bầu trời xanh? Đặng",
          "Warum ist der Himmel blau? Straße, Äpfel, ß ẞ", "naïve café résumé Ångström ﬁ ﬂ", "e\u0301 n\u0303 a\u030a\u0323", "ᏣᎳᎩ ᐃᓄᒃᑎᑐᑦ 𐌰𐌱𐌲 𓀀𓀁", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚 Ⅷ ½ ² ₃ ㈠"]
EMOJI = ["😀", "👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇯🇵", "❤️", "🧑🏿‍🚀", "☺", "1️⃣", "🫠", "🤷‍♀️", "⚡", "™", "🎉🎉🎉"]
SPACES = [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\t\t", " \n ", "\u00a0", "\u3000", "\u2003", "\u200b", "\u2028", "\u0085", "\x0b", "\x0c", "        ", "\n\n\n\n", " \t \t", "\u202f", "\u1680", "\u180e", "\ufeff"]
CONTROL = [chr(c) for c in [*range(0, 32), 127, *range(128, 160)]] + ["\u200d", "\u200e", "\ufffd", "\ufffe", "\U0010ffff", "\ue000", "\ufdd0"]
DIGITS = ["0", "7", "42", "123", "1234", "1234567890", "3.14159", "1,000,000", "2026-11-21T22:45:00Z", "0x1F", "1e10", "-5", "٣٤", "①", "½", "Ⅳ", "१२", "9" * 40]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<|im_start|", "|im_end|>", "<|im_start|>user\nhi<|im_end|>\n", "<empty_output>", "<|IM_END|>"]


def words(r, n):
    return " ".join(r.choice(ENGLISH) for _ in range(n))


def cut(r, text):
    a = r.randrange(len(text))
    return text[a : a + r.randrange(1, 24)]


def any_character(r):
    while True:
        c = r.choice([r.randrange(0x80), r.randrange(0x800), r.randrange(0x3000, 0xA000), r.randrange(0x10000), r.randrange(0x110000)])
        if not 0xD800 <= c < 0xE000:
            return chr(c)


def piece(r):
    return r.choice([
        lambda: words(r, r.randrange(1, 6)), lambda: r.choice(CODE), lambda: cut(r, CHINESE), lambda: cut(r, JAPANESE), lambda: cut(r, ARABIC), lambda: cut(r, KOREAN),
        lambda: cut(r, r.choice(OTHERS)), lambda: r.choice(EMOJI), lambda: r.choice(SPACES), lambda: r.choice(CONTROL), lambda: r.choice(DIGITS), lambda: any_character(r),
    ])()


def strings():
    r = random.Random(20261121)
    fixed = ["", " ", "a", *CODE, CHINESE, JAPANESE, KOREAN, ARABIC, *OTHERS, *EMOJI, *SPACES, *CONTROL, *DIGITS, *SPECIAL]
    fixed += [f"{a}{s}{b}" for s in SPACES for a, b in (("x", "y"), ("1", "2"), (".", "!"), ("'s", "'LL"))]
    yield from fixed
    kinds = [
        lambda: words(r, r.randrange(1, 40)),
        lambda: "".join(r.choice(CODE) for _ in range(r.randrange(1, 4))),
        lambda: cut(r, CHINESE) + cut(r, JAPANESE) + cut(r, ARABIC),
        lambda: "".join(r.choice(EMOJI + SPACES) for _ in range(r.randrange(1, 10))),
        lambda: "".join(r.choice(DIGITS + SPACES[:6] + list(".,:-'a")) for _ in range(r.randrange(1, 10))),
        lambda: "".join(r.choice(SPACES) for _ in range(r.randrange(1, 12))),
        lambda: "".join(r.choice(CONTROL + ["a", " ", "1"]) for _ in range(r.randrange(1, 12))),
        lambda: "".join(any_character(r) for _ in range(r.randrange(1, 16))),
        lambda: "".join(piece(r) for _ in range(r.randrange(2, 8))),
        lambda: "".join(r.choice([r.choice(SPECIAL), piece(r)]) for _ in range(r.randrange(2, 6))),
    ]
    for i in range(1000 - len(fixed)):
        yield kinds[i % len(kinds)]()


def main():
    model = Llama(sys.argv[1], vocab_only=True, verbose=False)
    for text in strings():
        ids = model.tokenize(text.encode(), add_bos=False, special=True)
        print(json.dumps({"text": text, "ids": ids}, separators=(",", ":")))


main()
