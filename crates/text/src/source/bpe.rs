//! Writes Hugging Face's tokenizer.json for byte-level BPE, from a vocabulary, its merges and the name of a pre-tokenizer
//! as llama.cpp knows it (`tokenizer.ggml.pre`).

use crate::TextCard;
use crate::tokenizer::byte_alphabet;
use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use serde_json::{Value, json};

/// How text is cut into words before the merges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PreTokenizer {
    /// GPT-2's regular expression.
    Gpt2,
    /// Each digit alone, then GPT-2's.
    SmolLm,
    /// Llama 3's; whole words that are in the vocabulary skip the merges.
    Llama3,
    /// Qwen 2's.
    Qwen2,
}

/// What [`PreTokenizer::named`] knows.
pub(super) const SUPPORTED: &str = "default, gpt-2, smollm, llama-bpe (llama3, llama-v3), qwen2";

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

impl PreTokenizer {
    /// By `tokenizer.ggml.pre`.
    pub(super) fn named(name: &str) -> Option<Self> {
        Some(match name {
            "default" | "gpt-2" | "gpt2" => Self::Gpt2,
            "smollm" => Self::SmolLm,
            "llama-bpe" | "llama3" | "llama-v3" => Self::Llama3,
            "qwen2" => Self::Qwen2,
            _ => return None,
        })
    }

    /// Whether llama.cpp begins texts with BOS where the file does not say.
    pub(super) fn adds_bos(self) -> bool {
        match self {
            Self::Llama3 => true,
            Self::Gpt2 | Self::SmolLm | Self::Qwen2 => false,
        }
    }

    fn json(self) -> Value {
        let byte_level = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
        let split =
            |regex| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        match self {
            Self::Gpt2 => byte_level(true),
            Self::SmolLm => {
                json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, byte_level(true)]})
            }
            Self::Llama3 => json!({"type": "Sequence", "pretokenizers": [split(LLAMA3), byte_level(false)]}),
            Self::Qwen2 => json!({"type": "Sequence", "pretokenizers": [split(QWEN2), byte_level(false)]}),
        }
    }
}

/// What one entry of the vocabulary is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenKind {
    /// Made by merges.
    Normal,
    /// Found in texts whole; part of what is said.
    UserDefined,
    /// Found in texts whole; steers the model and is not shown.
    Control,
}

/// A vocabulary by id, with `merges` as pairs in order of rank.
pub(super) struct Vocabulary<'a> {
    pub(super) tokens: &'a [String],
    pub(super) kinds: &'a [TokenKind],
    pub(super) merges: Vec<(&'a str, &'a str)>,
}

/// In the order of ids, so that equal vocabularies give equal bytes.
struct ById<'a>(&'a [String]);

impl Serialize for ById<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (id, token) in self.0.iter().enumerate() {
            map.serialize_entry(token, &id)?;
        }
        map.end()
    }
}

#[derive(Serialize)]
struct File<'a> {
    version: &'static str,
    added_tokens: Vec<Value>,
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Model<'a>,
}

#[derive(Serialize)]
struct Model<'a> {
    r#type: &'static str,
    ignore_merges: bool,
    vocab: ById<'a>,
    merges: &'a [(&'a str, &'a str)],
}

/// tokenizer.json of a vocabulary.
pub(super) fn tokenizer_json(vocabulary: &Vocabulary<'_>, pre: PreTokenizer) -> String {
    let added = vocabulary
        .tokens
        .iter()
        .zip(vocabulary.kinds)
        .enumerate()
        .filter(|(_, (_, kind))| **kind != TokenKind::Normal);
    let added_tokens = added
        .map(|(id, (content, kind))| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": *kind == TokenKind::Control})
        })
        .collect();
    let file = File {
        version: "1.0",
        added_tokens,
        // As the models were trained. llama.cpp leaves it out.
        normalizer: if pre == PreTokenizer::Qwen2 {
            json!({"type": "NFC"})
        } else {
            Value::Null
        },
        pre_tokenizer: pre.json(),
        decoder: json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}),
        model: Model {
            r#type: "BPE",
            ignore_merges: pre == PreTokenizer::Llama3,
            vocab: ById(vocabulary.tokens),
            merges: &vocabulary.merges,
        },
    };
    serde_json::to_string(&file).expect("text and numbers serialise")
}

const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// A byte is a token; then come `<|im_start|>`, `<|im_end|>` and `<|endoftext|>`.
pub(crate) fn stub_text(name: &str, context_tokens: u32) -> TextCard {
    let mut tokens: Vec<String> = byte_alphabet().map(|(_, character)| character.to_string()).collect();
    tokens.extend(["<|im_start|>", "<|im_end|>", "<|endoftext|>"].map(String::from));
    let kinds: Vec<TokenKind> = (0..tokens.len())
        .map(|id| {
            if id < 256 {
                TokenKind::Normal
            } else {
                TokenKind::Control
            }
        })
        .collect();
    let vocabulary = Vocabulary {
        tokens: &tokens,
        kinds: &kinds,
        merges: Vec::new(),
    };
    TextCard {
        name: name.to_owned(),
        context_tokens,
        vocab: crate::ModelCard::STUB_VOCAB,
        eos_tokens: vec![257],
        bos_token: None,
        add_bos: false,
        tokenizer_json: tokenizer_json(&vocabulary, PreTokenizer::Gpt2),
        chat_template: Some(CHATML.to_owned()),
        bos_text: String::new(),
        eos_text: "<|im_end|>".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tokenizer;

    /// With a vocabulary in which each word that the pre-tokenizer may cut is one token, the tokens are the words.
    fn words(pre: PreTokenizer, text: &str, merged: &[&str]) -> Vec<String> {
        let alphabet: Vec<(u8, char)> = byte_alphabet().collect();
        let spell = |text: &str| {
            text.bytes()
                .map(|byte| alphabet[byte as usize].1.to_string())
                .collect::<Vec<_>>()
        };
        let mut tokens: Vec<String> = alphabet.iter().map(|(_, character)| character.to_string()).collect();
        let mut pairs = Vec::new();
        for word in merged {
            let spelled = spell(word);
            for length in 2..=spelled.len() {
                let (left, right) = (spelled[..length - 1].concat(), spelled[length - 1].clone());
                if !tokens.contains(&(left.clone() + &right)) {
                    tokens.push(left.clone() + &right);
                    pairs.push((left, right));
                }
            }
        }
        let kinds = vec![TokenKind::Normal; tokens.len()];
        let merges = pairs
            .iter()
            .map(|(left, right)| (left.as_str(), right.as_str()))
            .collect();
        let json = tokenizer_json(
            &Vocabulary {
                tokens: &tokens,
                kinds: &kinds,
                merges,
            },
            pre,
        );
        let tokenizer = Tokenizer::from_json(&json, None).unwrap();
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids), text);
        ids.iter().map(|id| tokenizer.decode(&[*id])).collect()
    }

    #[test]
    fn each_pre_tokenizer_cuts_as_its_model_does() {
        let merged = ["1234", "DON", "'T", "hi", "!\n", "  "];
        let cut = |pre| words(pre, "DON'T1234hi!\n  x", &merged);
        assert_eq!(
            cut(PreTokenizer::Gpt2),
            ["DON", "'", "T", "1234", "hi", "!", "\n", " ", " ", "x"]
        );
        assert_eq!(
            cut(PreTokenizer::SmolLm),
            ["DON", "'", "T", "1", "2", "3", "4", "hi", "!", "\n", " ", " ", "x"]
        );
        assert_eq!(
            cut(PreTokenizer::Llama3),
            ["DON", "'T", "123", "4", "hi", "!\n", " ", " ", "x"]
        );
        assert_eq!(
            cut(PreTokenizer::Qwen2),
            ["DON", "'T", "1", "2", "3", "4", "hi", "!\n", " ", " ", "x"]
        );
    }

    #[test]
    fn names_are_llama_cpps() {
        assert_eq!(PreTokenizer::named("smollm"), Some(PreTokenizer::SmolLm));
        assert_eq!(PreTokenizer::named("llama-bpe"), Some(PreTokenizer::Llama3));
        assert_eq!(PreTokenizer::named("deepseek-llm"), None);
        assert!(SUPPORTED.contains("qwen2") && PreTokenizer::Llama3.adds_bos() && !PreTokenizer::SmolLm.adds_bos());
    }
}
