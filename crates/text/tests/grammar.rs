//! Grammars over the real model's vocabulary and the stub's: what they allow is what they say, wherever an output is taken
//! up again, and what cannot be promised is refused.

#![allow(clippy::unwrap_used)] // a test that panics fails, which is what is wanted

mod support;

use baton_text::{GrammarError, Grammars, ModelCard, Tokenizer};
use baton_types::{Grammar, TokenSet};
use serde_json::{Value, json};
use std::sync::LazyLock;
use support::{facts, model};

struct Text {
    tokenizer: Tokenizer,
    grammars: Grammars,
    card: ModelCard,
}

fn text_of(card: ModelCard) -> Text {
    let tokenizer = Tokenizer::new(&card).expect("its tokenizer is supported");
    let grammars = Grammars::new(&card, &tokenizer);
    Text {
        tokenizer,
        grammars,
        card,
    }
}

static REAL: LazyLock<Text> = LazyLock::new(|| {
    let text = ModelCard::text_of(&model()).expect("the model has a text part");
    text_of(ModelCard::new(text, facts()))
});
static STUB: LazyLock<Text> = LazyLock::new(|| text_of(ModelCard::stub("stub", 1000, facts())));

fn schema(value: &Value) -> Grammar {
    Grammar::JsonSchema(value.to_string())
}

fn regex(text: &str) -> Grammar {
    Grammar::Regex(text.into())
}

/// Picks by chance, from a seed, among what is allowed.
fn pick(allowed: &TokenSet, state: &mut u64) -> u32 {
    *state = state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    let nth = (*state >> 33) as usize % allowed.count();
    let ids = 0..32 * allowed.words().len() as u32;
    ids.filter(|id| allowed.contains(*id))
        .nth(nth)
        .expect("nth is below the count")
}

impl Text {
    /// An output by chance: its tokens without the last, which ends it. At each token a matcher that is made anew from the
    /// tokens so far allows the same ones.
    fn output(&self, grammar: &Grammar, seed: u64, anew: bool) -> Vec<u32> {
        let mut matcher = self.grammars.matcher(grammar, &[]).unwrap();
        let (mut tokens, mut state) = (Vec::new(), seed);
        for _ in 0..2000 {
            let allowed = matcher.allowed().unwrap();
            if anew {
                let again = self.grammars.matcher(grammar, &tokens).unwrap().allowed().unwrap();
                assert!(again == allowed, "after {:?}", self.tokenizer.decode(&tokens));
            }
            let token = pick(&allowed, &mut state);
            if self.card.eos_tokens.contains(&token) {
                return tokens;
            }
            tokens.push(token);
            matcher.accept(&[token]).unwrap();
        }
        panic!("no end after {:?}", self.tokenizer.decode(&tokens));
    }

    /// Whether `output` as the tokenizer cuts it is one of the grammar's.
    fn takes(&self, grammar: &Grammar, output: &str) -> bool {
        let mut matcher = self.grammars.matcher(grammar, &[]).unwrap();
        for token in self.tokenizer.encode(output, false).unwrap() {
            if !matcher.allowed().unwrap().contains(token) {
                return false;
            }
            matcher.accept(&[token]).unwrap();
        }
        let last = matcher.allowed().unwrap();
        self.card.eos_tokens.iter().all(|eos| last.contains(*eos))
    }
}

fn person() -> Grammar {
    schema(&json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["a", "b", "ü"]}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": false,
    }))
}

#[test]
fn whatever_is_drawn_parses_and_has_the_schemas_shape() {
    for text in [&*REAL, &*STUB] {
        for seed in 0..20 {
            let tokens = text.output(&person(), seed, seed < 2);
            let value: Value = serde_json::from_str(&text.tokenizer.decode(&tokens)).unwrap();
            let name = value["name"].as_str().unwrap();
            assert!(name.chars().count() <= 12, "{value}");
            assert!(value["age"].as_u64().unwrap() <= 120, "{value}");
            let tags = value["tags"].as_array().unwrap();
            assert!((1..=3).contains(&tags.len()), "{value}");
            assert!(
                tags.iter().all(|tag| ["a", "b", "ü"].contains(&tag.as_str().unwrap())),
                "{value}"
            );
            assert_eq!(value.as_object().unwrap().len(), 3, "{value}");
        }
    }
}

#[test]
fn properties_come_in_the_schemas_order_on_one_line() {
    assert!(REAL.takes(&person(), r#"{"name": "Ada", "age": 36, "tags": ["a", "ü"]}"#));
    assert!(!REAL.takes(&person(), r#"{"age": 36, "name": "Ada", "tags": ["a"]}"#));
    assert!(!REAL.takes(&person(), r#"{"name": "Ada", "age": 36, "tags": ["a"]} "#));
    assert!(!REAL.takes(&person(), r#"{"name":  "Ada", "age": 36, "tags": ["a"]}"#));
    assert!(!REAL.takes(&person(), r#"{"name": "Ada", "age": 121, "tags": ["a"]}"#));
}

#[test]
fn a_regex_is_matched_from_start_to_end() {
    let date = regex(r"[0-9]{4}-(0[1-9]|1[0-2])-[0-3]\d");
    assert!(REAL.takes(&date, "2024-12-31"));
    assert!(!REAL.takes(&date, "2024-13-31"));
    assert!(!REAL.takes(&date, "2024-12-3"));
    assert!(!REAL.takes(&date, "on 2024-12-31"));
    let words = regex(r"(yes|no|vielleicht/\w{2,3} \\ ☃)");
    assert!(REAL.takes(&words, r"vielleicht/ab \ ☃"));
    for seed in 0..20 {
        let tokens = REAL.output(&words, seed, true);
        let output = REAL.tokenizer.decode(&tokens);
        assert!(
            output == "yes" || output == "no" || output.starts_with("vielleicht/"),
            "{output:?}"
        );
    }
}

#[test]
fn the_end_is_forced_and_special_tokens_are_nowhere_else() {
    let mut matcher = REAL.grammars.matcher(&regex("ab"), &[]).unwrap();
    let first = matcher.allowed().unwrap();
    assert!(REAL.card.eos_tokens.iter().all(|eos| !first.contains(*eos)));
    matcher.accept(&REAL.tokenizer.encode("ab", false).unwrap()).unwrap();
    let last = matcher.allowed().unwrap();
    assert!(REAL.card.eos_tokens.iter().all(|eos| last.contains(*eos)));
    assert_eq!(last.count(), REAL.card.eos_tokens.len());
    // `<|im_start|>` as a text is tokens of its letters, not the token of that name.
    let named = regex(r"<\|im_start\|>");
    let mut matcher = REAL.grammars.matcher(&named, &[]).unwrap();
    assert!(!matcher.allowed().unwrap().contains(1));
}

#[test]
fn tokens_that_a_grammar_does_not_allow_are_errors() {
    let tokens = REAL.tokenizer.encode("ac", false).unwrap();
    let error = REAL.grammars.matcher(&regex("ab"), &tokens).unwrap_err();
    assert!(matches!(error, GrammarError::Stuck { .. }), "{error}");
    assert!(!error.is_retryable());
}

#[test]
fn what_cannot_be_promised_is_refused_by_name() {
    let refused = |grammar: &Grammar| match REAL.grammars.matcher(grammar, &[]) {
        Ok(_) => format!("{:.80} was taken", format!("{grammar:?}")),
        Err(error) => error.to_string(),
    };
    for (grammar, part) in [
        (Grammar::JsonSchema("{".into()), "no JSON schema"),
        (Grammar::JsonSchema("[]".into()), "an object"),
        (Grammar::JsonSchema("false".into()), "an object"),
        (schema(&json!({"type": "text"})), "text"),
        (schema(&json!({"type": "array", "uniqueItems": true})), "uniqueItems"),
        (schema(&json!({"not": {"type": "string"}})), "not"),
        (schema(&json!({"$ref": "#/$defs/absent"})), "absent"),
        (
            schema(&json!({"$ref": "https://example.com/schema.json"})),
            "example.com",
        ),
        (schema(&json!({"type": "string", "pattern": "(?=a)b"})), "look"),
        (
            schema(&json!({"type": "integer", "minimum": 3, "maximum": 2})),
            "minimum",
        ),
        (regex("(ab"), "unclosed group"),
        (regex(r"(a)\1"), "backreference"),
        (regex(r"ab\"), "backslash"),
        (regex(r"a\bc"), "look"),
        (regex("((a{1000}){1000}){1000}"), ""),
        (regex(&"(".repeat(30_000)), ""),
    ] {
        let error = refused(&grammar);
        assert!(
            error.contains(part) && error.len() < 500,
            "{part:?} is not in {error:?}"
        );
    }
}

#[test]
fn a_grammar_cannot_change_how_it_is_read() {
    let lenient = json!({
        "type": "object", "properties": {"a": {"type": "integer", "not": {"const": 1}}},
        "x-guidance": {"lenient": true},
    });
    assert!(REAL.grammars.matcher(&schema(&lenient), &[]).is_err());
    // A line break in a regex is a character like any other.
    let broken = regex("a\nstart: /b/");
    assert!(REAL.takes(&broken, "a\nstart: /b/") && !REAL.takes(&broken, "b"));
}

#[test]
fn a_card_alone_is_enough() {
    let of_card = Grammars::of_card(&REAL.card);
    let first = of_card.matcher(&person(), &[]).unwrap().allowed().unwrap();
    assert!(first == REAL.grammars.matcher(&person(), &[]).unwrap().allowed().unwrap());
    let endless = ModelCard {
        eos_tokens: Vec::new(),
        ..REAL.card.clone()
    };
    let error = Grammars::of_card(&endless).matcher(&person(), &[]).unwrap_err();
    assert!(matches!(error, GrammarError::Vocabulary { .. }), "{error}");
}
