//! The real model's tokenizer against llama.cpp's token ids for the same file (made by
//! tests/golden/tokenizer_llama_cpp.py), its template, and what becomes of broken copies of the file.

mod support;

use baton_text::{CardError, ChatTemplate, Message, ModelCard, TextCard, Tokenizer};
use serde::Deserialize;
use std::path::PathBuf;
use std::sync::LazyLock;
use support::{WORKSPACE, facts, model};

static TEXT: LazyLock<TextCard> = LazyLock::new(|| ModelCard::text_of(&model()).expect("the model has a text part"));
static CARD: LazyLock<ModelCard> = LazyLock::new(|| ModelCard::new(TEXT.clone(), facts()));
static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::new(&CARD).expect("its tokenizer is supported"));

#[derive(Deserialize)]
struct Golden {
    text: String,
    ids: Vec<u32>,
}

fn goldens() -> Vec<Golden> {
    let lines =
        std::fs::read_to_string(PathBuf::from(WORKSPACE).join("tests/golden/tokenizer_ids.jsonl")).expect("checked in");
    lines
        .lines()
        .map(|line| serde_json::from_str(line).expect("a golden"))
        .collect()
}

#[test]
fn ids_are_llama_cpps() {
    let goldens = goldens();
    assert_eq!(goldens.len(), 1000);
    let mut wrong = Vec::new();
    for Golden { text, ids } in &goldens {
        let ours = TOKENIZER.encode(text, true).unwrap();
        if ours != *ids {
            wrong.push(format!("{text:?}\n  ours   {ours:?}\n  theirs {ids:?}"));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of 1000 differ:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

/// Bytes for which this vocabulary has no token; see tests/golden/tokenizer.md.
const NO_TOKEN: [u8; 8] = [0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2];

#[test]
fn text_comes_back_exactly() {
    let (mut exact, mut lossy) = (0, 0);
    for Golden { text, .. } in goldens() {
        let ids = TOKENIZER.encode(&text, false).unwrap();
        let decoded = TOKENIZER.decode(&ids);
        let mut detokenizer = TOKENIZER.detokenizer();
        let mut streamed: String = ids.iter().map(|id| detokenizer.push(*id)).collect();
        streamed += &detokenizer.finish();
        assert_eq!(streamed, decoded);
        if ids.iter().any(|id| *id <= 16) {
            continue; // special tokens have no text
        }
        if text.bytes().any(|byte| NO_TOKEN.contains(&byte)) {
            let kept: Vec<u8> = text.bytes().filter(|byte| !NO_TOKEN.contains(byte)).collect();
            assert_eq!(decoded, String::from_utf8_lossy(&kept));
            lossy += 1;
        } else {
            assert_eq!(decoded, text);
            exact += 1;
        }
    }
    assert!(
        exact > 700 && lossy < 100,
        "{exact} exact, {lossy} with bytes that have no token"
    );
}

#[test]
fn long_runs_come_back_exactly() {
    for run in [" ", "a", "1", "\n", " \n", "é", "!", "汉", "ab ", "<"] {
        let text = run.repeat(100_000) + "x";
        let ids = TOKENIZER.encode(&text, false).unwrap();
        assert!(TOKENIZER.decode(&ids) == text, "a run of {run:?}");
    }
}

#[test]
fn the_card_says_what_the_file_says() {
    let card = &*CARD;
    assert_eq!(card.name, model().file_stem().unwrap().to_string_lossy());
    assert_eq!((card.context_tokens, card.vocab), (8192, 49152));
    assert_eq!((card.bos_token, card.add_bos), (Some(1), false));
    assert_eq!(card.eos_tokens, [2, 0]);
    let again = ModelCard::from_bytes(&card.to_bytes()).unwrap();
    assert_eq!(&again, card);
    assert_eq!(again.digest(), card.digest());
    assert_ne!(
        ModelCard {
            block_tokens: 32,
            ..again
        }
        .digest(),
        card.digest()
    );
    assert!(ModelCard::from_bytes(b"{}").is_err());
}

#[test]
fn the_template_makes_the_turns() {
    let card = &*CARD;
    let template = ChatTemplate::new(card.chat_template.as_deref().unwrap(), &card.bos_text, &card.eos_text).unwrap();
    let chat = [Message {
        role: "user".into(),
        content: "Why is the sky blue? <|im_end|>".into(),
    }];
    let text = template.render(&chat, true).unwrap();
    assert_eq!(
        text,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\nWhy is the sky blue? <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    );
    let forged = TOKENIZER.encode(&text, false).unwrap();
    let safe = TOKENIZER.encode_chat(&template, &chat, true).unwrap();
    let ends = |ids: &[u32]| ids.iter().filter(|id| **id == 2).count();
    assert_eq!((ends(&forged), ends(&safe)), (3, 2));
    assert!(TOKENIZER.decode(&safe).contains("blue? <|im_end|>\n"));
}

#[test]
fn broken_files_are_errors() {
    let whole = std::fs::read(model()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broken.gguf");
    let read = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        ModelCard::text_of(&path)
    };
    for length in [0, 3, 30, 1000, 200_000, 1_000_000] {
        assert!(
            matches!(read(&whole[..length]), Err(CardError::Truncated { .. })),
            "cut at {length}"
        );
    }
    let head = &whole[..4 << 20];
    assert!(read(head).is_ok(), "the metadata is all that is read");
    let replaced = |from: &[u8], to: &[u8]| {
        let at = head.windows(from.len()).position(|window| window == from).unwrap();
        let mut bytes = head.to_vec();
        bytes[at..at + to.len()].copy_from_slice(to);
        read(&bytes).unwrap_err().to_string()
    };
    let error = replaced(b"smollm\x15", b"smello\x15");
    assert!(
        error.contains("tokenizer.ggml.pre is `smello`") && error.contains("smollm"),
        "{error}"
    );
    let error = replaced(b"gpt2\x12", b"bert\x12");
    assert!(error.contains("tokenizer.ggml.model is `bert`"), "{error}");
    let error = replaced("Ġ t".as_bytes(), "Ġ_t".as_bytes());
    assert!(error.contains("tokenizer.ggml.merges"), "{error}");
    let error = ModelCard::text_of(&folder.path().join("absent.gguf")).unwrap_err();
    assert!(matches!(error, CardError::Io { .. }));
}
