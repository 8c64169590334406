//! Rust source, read just well enough to tell code from comments, literals and tests.

use super::workspace;
use std::ops::Range;

/// One file of Rust.
pub struct Source {
    pub file: String,
    pub text: String,
    /// As `text`, with comments and the insides of literals blanked, line for line.
    pub code: String,
    /// Literals of strings, with their lines (from 1).
    pub strings: Vec<(usize, String)>,
    /// Of a module that is declared for tests only.
    declared_test: bool,
}

impl Source {
    pub fn new(file: String, text: String) -> Self {
        let (code, strings) = strip(&text);
        Self {
            file,
            text,
            code,
            strings,
            declared_test: false,
        }
    }

    /// A whole file of tests, benches or examples.
    pub fn is_test(&self) -> bool {
        let name = self.file.rsplit('/').next().unwrap_or_default();
        let folder = ["tests/", "benches/", "examples/"];
        if self.declared_test {
            return true;
        }
        folder
            .iter()
            .any(|folder| self.file.starts_with(folder) || self.file.contains(&format!("/{folder}")))
            || ["test.rs", "tests.rs"].contains(&name)
            || name.ends_with("_test.rs")
            || name.ends_with("_tests.rs")
    }

    /// Made by a program.
    pub fn is_generated(&self) -> bool {
        self.file.contains("/generated/")
    }

    /// Items that are built for tests only: where they begin and end in `code`.
    fn test_items(&self) -> Vec<Range<usize>> {
        let mut items = Vec::new();
        let mut from = 0;
        while let Some(found) = self.code[from..].find("#[cfg(test)]") {
            let start = from + found;
            from = item_end(&self.code, start);
            items.push(start..from);
        }
        items
    }

    /// Modules with files of their own that are declared for tests only: their paths without `.rs`.
    fn test_modules(&self) -> Vec<String> {
        let (folder, name) = self.file.rsplit_once('/').unwrap_or(("", &self.file));
        let inside = match name.trim_end_matches(".rs") {
            "lib" | "main" | "mod" => folder.to_owned(),
            stem => format!("{folder}/{stem}"),
        };
        let declared = self.test_items().into_iter().filter_map(|item| {
            let (_, module) = self.code[item].strip_suffix(';')?.rsplit_once("mod ")?;
            Some(format!("{inside}/{}", module.trim()))
        });
        declared.collect()
    }

    /// The code with what is for tests only blanked.
    pub fn code_without_tests(&self) -> String {
        let mut code = self.code.clone();
        for item in self.test_items() {
            let blank: String = code[item.clone()]
                .bytes()
                .map(|b| if b == b'\n' { '\n' } else { ' ' })
                .collect();
            code.replace_range(item, &blank);
        }
        code
    }

    /// Literals of strings outside of tests.
    pub fn strings_without_tests(&self) -> impl Iterator<Item = &str> {
        let line = |at: usize| 1 + self.code[..at].matches('\n').count();
        let tests: Vec<_> = self
            .test_items()
            .into_iter()
            .map(|item| line(item.start)..line(item.end) + 1)
            .collect();
        let built = self
            .strings
            .iter()
            .filter(move |(line, _)| !tests.iter().any(|lines| lines.contains(line)));
        built.map(|(_, text)| text.as_str())
    }

    /// How many lines stand before the first test module of the file.
    pub fn lines_before_tests(&self) -> usize {
        let modules =
            |item: &Range<usize>| self.code[item.clone()].contains("mod ") && self.code[item.clone()].contains('{');
        match self.test_items().into_iter().find(modules) {
            Some(item) => self.code[..item.start].lines().count(),
            None => self.text.lines().count(),
        }
    }
}

/// All Rust files of the repository.
pub fn sources() -> Vec<Source> {
    let rust = workspace::files().into_iter().filter(|file| file.ends_with(".rs"));
    let read = rust.filter_map(|file| workspace::read(&file).map(|text| Source::new(file, text)));
    let mut sources: Vec<Source> = read.collect();
    let tests: Vec<String> = sources.iter().flat_map(Source::test_modules).collect();
    for source in &mut sources {
        let place = source.file.trim_end_matches(".rs");
        source.declared_test = tests
            .iter()
            .any(|module| place == module || place.starts_with(&format!("{module}/")));
    }
    sources
}

/// Where `word` stands as a word of its own: lines, from 1.
pub fn lines_with(code: &str, word: &str) -> Vec<usize> {
    let is_word = |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
    let bytes = code.as_bytes();
    code.match_indices(word)
        .filter(|(at, _)| !(is_word(word.as_bytes().first()) && *at > 0 && is_word(bytes.get(at - 1))))
        .filter(|(at, _)| !(is_word(word.as_bytes().last()) && is_word(bytes.get(at + word.len()))))
        .map(|(at, _)| 1 + code[..at].matches('\n').count())
        .collect()
}

/// One past the item that begins at `start`: its closing brace, or its semicolon.
fn item_end(code: &str, start: usize) -> usize {
    let mut depth = 0_usize;
    for (at, character) in code[start..].char_indices() {
        match character {
            '{' => depth += 1,
            '}' if depth == 1 => return start + at + 1,
            '}' => depth = depth.saturating_sub(1),
            ';' if depth == 0 => return start + at + 1,
            _ => {}
        }
    }
    code.len()
}

/// What is being read.
enum State {
    Code,
    Line,
    Block(usize),
    /// In a string, raw with so many hashes, from this line on.
    Text {
        raw: Option<usize>,
        line: usize,
        text: String,
    },
}

fn strip(source: &str) -> (String, Vec<(usize, String)>) {
    let chars: Vec<char> = source.chars().collect();
    let (mut code, mut strings) = (String::with_capacity(source.len()), Vec::new());
    let (mut state, mut at, mut line) = (State::Code, 0, 1);
    while at < chars.len() {
        let (character, next) = (chars[at], chars.get(at + 1).copied());
        let mut width = 1;
        let mut kept = false;
        match &mut state {
            State::Code => match (character, next) {
                ('/', Some('/')) => state = State::Line,
                ('/', Some('*')) => (state, width) = (State::Block(1), 2),
                ('"', _) => {
                    state = State::Text {
                        raw: raw_hashes(&chars[..at]),
                        line,
                        text: String::new(),
                    }
                }
                ('\'', _) => match char_literal(&chars[at..]) {
                    Some(len) => width = len,
                    None => kept = true,
                },
                _ => kept = true,
            },
            State::Line => {
                if character == '\n' {
                    state = State::Code;
                }
            }
            State::Block(depth) => match (character, next) {
                ('/', Some('*')) => (*depth, width) = (*depth + 1, 2),
                ('*', Some('/')) => {
                    width = 2;
                    *depth -= 1;
                    if *depth == 0 {
                        state = State::Code;
                    }
                }
                _ => {}
            },
            State::Text { raw, line, text } => {
                let hashes = raw.unwrap_or(0);
                let ends = character == '"' && (1..=hashes).all(|i| chars.get(at + i) == Some(&'#'));
                if ends {
                    strings.push((*line, std::mem::take(text)));
                    width = 1 + hashes;
                    state = State::Code;
                } else if raw.is_none() && character == '\\' {
                    width = 2;
                } else {
                    text.push(character);
                }
            }
        }
        for passed in &chars[at..(at + width).min(chars.len())] {
            match passed {
                '\n' => {
                    code.push('\n');
                    line += 1;
                }
                other if kept => code.push(*other),
                _ => code.push(' '),
            }
        }
        at += width;
    }
    (code, strings)
}

/// The hashes of a raw string whose quote comes next; none for one with escapes.
fn raw_hashes(before: &[char]) -> Option<usize> {
    let hashes = before.iter().rev().take_while(|c| **c == '#').count();
    let mark = before.iter().rev().nth(hashes);
    let earlier = before.iter().rev().nth(hashes + 1);
    let word = |c: &char| c.is_alphanumeric() || *c == '_';
    let raw = mark == Some(&'r') && (earlier.is_none_or(|c| !word(c)) || matches!(earlier, Some('b' | 'c')));
    raw.then_some(hashes)
}

/// How long the literal of a character is; none where the quote begins a lifetime.
fn char_literal(from: &[char]) -> Option<usize> {
    match from.get(1)? {
        '\\' => from.iter().take(14).skip(3).position(|c| *c == '\'').map(|end| end + 4),
        _ => (from.get(2) == Some(&'\'')).then_some(3),
    }
}

#[test]
fn code_is_told_from_the_rest() {
    let text = r##"
        // unsafe { "a" }
        fn f<'a>(x: &'a str) { let c = '"'; let d = '\''; let e = "un\"safe"; /* x /* y */ unsafe */ }
        const R: &str = r#"no "code" here"#;
        #[cfg(test)]
        mod tests { fn g() { todo() } }
        fn after() {}
    "##;
    let source = Source::new("x.rs".into(), text.into());
    assert_eq!(source.code.lines().count(), source.text.lines().count());
    assert!(lines_with(&source.code, "unsafe").is_empty(), "{}", source.code);
    assert_eq!(lines_with(&source.code, "fn"), [3, 6, 7]);
    assert_eq!(source.strings, [(3, "unsafe".into()), (4, "no \"code\" here".into())]);
    assert!(!source.code_without_tests().contains("todo"));
    assert!(source.code_without_tests().contains("after"));
    assert_eq!(source.lines_before_tests(), 5);
}
