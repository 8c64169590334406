//! Forty prompts of 1 to 2,000 tokens in five kinds.

use baton_proto::v1;
use baton_proto::v1::generate_request::Input;

/// What a prompt is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// English prose.
    English,
    /// Chinese prose.
    Chinese,
    /// Source code.
    Code,
    /// Text full of emoji.
    Emoji,
    /// A chat whose system prompt is empty.
    EmptySystem,
}

/// One prompt.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// What it is made of.
    pub kind: Kind,
    /// The text, or the user's message.
    pub text: String,
    /// Its length is cut to this many tokens, where given.
    pub tokens: Option<usize>,
}

impl Prompt {
    /// As a request's input, before any cut.
    pub fn input(&self) -> Input {
        let message = |role: &str, content: &str| v1::ChatMessage {
            role: role.into(),
            content: content.into(),
        };
        match self.kind {
            Kind::EmptySystem => Input::Messages(v1::ChatMessages {
                messages: vec![message("system", ""), message("user", &self.text)],
            }),
            Kind::English | Kind::Chinese | Kind::Code | Kind::Emoji => Input::Prompt(self.text.clone()),
        }
    }
}

const ENGLISH: [&str; 8] = [
    "The lighthouse keeper wrote in his log every evening, and tonight he wrote about",
    "A recipe for bread begins with flour, water, salt and",
    "The three largest oceans of the world are",
    "Dear committee, I am writing to ask whether the bridge on Mill Road can be repaired before",
    "In the year 1905 a young clerk in the patent office of Bern",
    "The orchestra tuned its instruments while the audience",
    "To change a bicycle tyre you first have to",
    "Once upon a time there was a clockmaker who could not",
];
const CHINESE: [&str; 7] = [
    "今天的天气很好,我们决定去公园",
    "中国的首都是北京,它有着悠久的历史,",
    "学习一门新的语言需要时间和耐心。首先,",
    "他打开窗户,看见外面下着大雪,",
    "请写一首关于秋天的诗:",
    "计算机科学是研究",
    "从前有一座山,山上有一座庙,庙里有",
];
const CODE: [&str; 8] = [
    "fn fibonacci(n: u64) -> u64 {\n    match n {\n",
    "def quicksort(items):\n    if len(items) <= 1:\n        return items\n",
    "SELECT name, COUNT(*) FROM orders JOIN customers ON",
    "#include <stdio.h>\n\nint main(int argc, char **argv) {\n    for (int i = 0;",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "const express = require('express');\nconst app = express();\n\napp.get('/',",
    "<!DOCTYPE html>\n<html>\n<head>\n  <title>Weather</title>\n",
    "import numpy as np\n\ndef softmax(x):\n    \"\"\"Returns",
];
const EMOJI: [&str; 7] = [
    "🎉🎂 Happy birthday! 🥳 We hope that you",
    "Weather today: ☀️☀️🌧️, tomorrow: 🌨️",
    "👩‍👩‍👧‍👦 went to the 🏖️ and",
    "🚀🚀🚀 Launch in 3, 2, 1",
    "Translate into words: 🐶 ❤️ 🦴 =",
    "😀😃😄😁😆😅🤣😂🙂🙃",
    "Menu 🍕 pizza 🍣 sushi 🌮",
];
const QUESTIONS: [&str; 7] = [
    "Why is the sky blue?",
    "Name three fruits that grow on trees.",
    "What is 17 plus 25?",
    "Write one sentence about rivers.",
    "How do birds find their way?",
    "Explain gravity to a child.",
    "Who wrote the play Hamlet?",
];

/// Sentences that never repeat within the length of a prompt.
fn chronicle(seed: usize, sentences: usize) -> String {
    const WHO: [&str; 7] = [
        "The miller",
        "A courier",
        "Her cousin",
        "The surgeon",
        "An old sailor",
        "The mayor",
        "Nobody",
    ];
    const DID: [&str; 6] = ["counted", "repaired", "sold", "remembered", "painted", "carried away"];
    const WHAT: [&str; 11] = [
        "barrels", "letters", "lanterns", "maps", "horses", "bells", "coats", "ladders", "books", "keys", "boats",
    ];
    (0..sentences)
        .map(|i| {
            let n = i * 31 + seed * 17;
            let (who, did, what) = (WHO[n % 7], DID[(n / 7) % 6], WHAT[(n / 3) % 11]);
            format!("{who} {did} {} {what} on day {}. ", 2 + n % 97, i + 1)
        })
        .collect()
}

/// All forty; the first twelve hold one of every kind, one single token, and one of 2,000 tokens.
pub fn prompts() -> Vec<Prompt> {
    let text = |kind, text: &str| Prompt {
        kind,
        text: text.into(),
        tokens: None,
    };
    let cut = |seed, tokens| Prompt {
        kind: Kind::English,
        text: chronicle(seed, tokens / 8),
        tokens: Some(tokens),
    };
    let mut all = vec![
        text(Kind::English, ENGLISH[0]),
        text(Kind::Chinese, CHINESE[0]),
        text(Kind::Code, CODE[0]),
        text(Kind::Emoji, EMOJI[0]),
        text(Kind::EmptySystem, QUESTIONS[0]),
        Prompt {
            tokens: Some(1),
            ..text(Kind::English, "Hello")
        },
        cut(1, 2000),
        cut(2, 16),
        cut(3, 33),
        text(Kind::Chinese, CHINESE[1]),
        text(Kind::Code, CODE[1]),
        cut(4, 257),
    ];
    all.extend(ENGLISH[1..].iter().map(|prompt| text(Kind::English, prompt)));
    all.extend(CHINESE[2..].iter().map(|prompt| text(Kind::Chinese, prompt)));
    all.extend(CODE[2..].iter().map(|prompt| text(Kind::Code, prompt)));
    all.extend(EMOJI[1..].iter().map(|prompt| text(Kind::Emoji, prompt)));
    all.extend(QUESTIONS[1..5].iter().map(|prompt| text(Kind::EmptySystem, prompt)));
    assert_eq!(all.len(), 40, "the campaign is defined over forty prompts");
    all
}
