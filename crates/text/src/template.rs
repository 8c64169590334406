//! Chat templates: Jinja as Hugging Face runs it (trimmed blocks, Python's string methods, `raise_exception`,
//! `strftime_now`, a `tojson` that escapes nothing).
//!
//! A message must not be able to forge a turn by containing the text of a special token, and only the renderer knows which
//! text is whose. So, for tokenization, each special token's text inside a message is broken by [`MARK`] before rendering;
//! the tokenizer finds special tokens in the marked text and then takes the marks out.

use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, context};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Breaks special tokens' texts inside messages. A noncharacter; one that a message contains itself is doubled.
pub(crate) const MARK: char = '\u{FDD0}';

const NAME: &str = "chat";

/// Instructions that one rendering may take: some 100,000 messages of an ordinary template. A model's template comes
/// from whoever made the model, and must not be able to keep the coordinator busy for ever.
const FUEL: u64 = 5_000_000;

/// One turn of a chat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// system, user, assistant or what else the template knows.
    pub role: String,
    /// Its text.
    pub content: String,
}

/// A template that does not compile, or a chat that it cannot render.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The model's template is broken.
    #[error("the model's chat template is broken: {reason}")]
    Broken {
        /// Where and why.
        reason: String,
    },
    /// The template refuses these messages (for instance their order of roles).
    #[error("the model's chat template refuses these messages: {reason}")]
    Refused {
        /// In the template's words.
        reason: String,
    },
}

impl TemplateError {
    /// The same chat will fail again.
    pub fn is_retryable(&self) -> bool {
        false
    }
}

/// A model's compiled chat template. Cheap to clone.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    bos: String,
    eos: String,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Compiles Jinja source. `bos` and `eos` are the texts that the template knows as `bos_token` and `eos_token`.
    ///
    /// # Errors
    /// Where the source is no template.
    pub fn new(template: &str, bos: &str, eos: &str) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", crate::date::strftime_now);
        environment.add_filter("tojson", to_json);
        environment
            .add_template_owned(NAME, template.to_owned())
            .map_err(|error| TemplateError::Broken {
                reason: describe(&error),
            })?;
        Ok(Self {
            environment: Arc::new(environment),
            bos: bos.to_owned(),
            eos: eos.to_owned(),
        })
    }

    /// The chat as one text. To get token ids use [`crate::Tokenizer::encode_chat`], which lets no message forge special
    /// tokens; tokenizing this text would.
    ///
    /// # Errors
    /// Where the template refuses the messages.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TemplateError> {
        let template = self
            .environment
            .get_template(NAME)
            .map_err(|error| TemplateError::Broken {
                reason: describe(&error),
            })?;
        let values = context! {
            messages => messages,
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos,
            eos_token => self.eos,
        };
        template.render(values).map_err(|error| TemplateError::Refused {
            reason: describe(&error),
        })
    }
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

fn describe(error: &Error) -> String {
    match (error.detail(), error.line()) {
        (Some(detail), Some(line)) => format!("{detail} (line {line})"),
        (Some(detail), None) => detail.to_owned(),
        (None, _) => error.to_string(),
    }
}

/// As Python's `json.dumps(value, ensure_ascii=False)`, which Hugging Face puts in the place of Jinja's own filter.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let failed = |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let mut out = Vec::new();
    match indent {
        Some(width) => {
            let spaces = " ".repeat(width.min(16));
            let pretty = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value
                .serialize(&mut serde_json::Serializer::with_formatter(&mut out, pretty))
                .map_err(failed)?;
        }
        None => value
            .serialize(&mut serde_json::Serializer::with_formatter(&mut out, Python))
            .map_err(failed)?,
    }
    let text = String::from_utf8(out).expect("serde_json writes UTF-8");
    Ok(Value::from_safe_string(text))
}

/// Python's separators: `", "` and `": "`.
struct Python;

impl serde_json::ser::Formatter for Python {
    fn begin_array_value<W: std::io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: std::io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: std::io::Write + ?Sized>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(turns: &[(&str, &str)]) -> Vec<Message> {
        turns
            .iter()
            .map(|(role, content)| Message {
                role: (*role).into(),
                content: (*content).into(),
            })
            .collect()
    }

    #[test]
    fn blocks_are_trimmed_and_tokens_named() {
        let source = "{%- for m in messages %}\n  {% if m.role == 'user' %}\n{{ bos_token + m['content'].strip() }}\n  {% endif %}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}";
        let template = ChatTemplate::new(source, "<s>", "</s>").unwrap();
        assert_eq!(
            template.render(&chat(&[("user", " a "), ("x", "b")]), true).unwrap(),
            "<s>a\n>"
        );
    }

    #[test]
    fn exceptions_carry_their_words() {
        let template = ChatTemplate::new("{{ raise_exception('roles must alternate') }}", "", "").unwrap();
        let error = template.render(&chat(&[("user", "a")]), true).unwrap_err();
        assert!(
            matches!(&error, TemplateError::Refused { reason } if reason.contains("roles must alternate")),
            "{error}"
        );
        let error = ChatTemplate::new("{% for %}", "", "").unwrap_err();
        assert!(matches!(error, TemplateError::Broken { .. }));
    }

    #[test]
    fn an_endless_template_ends() {
        let source = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
        let template = ChatTemplate::new(source, "", "").unwrap();
        assert!(matches!(template.render(&[], true), Err(TemplateError::Refused { .. })));
        let ordinary =
            ChatTemplate::new("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", "", "").unwrap();
        assert!(
            ordinary
                .render(&vec![chat(&[("user", "a")]).remove(0); 10_000], true)
                .is_ok()
        );
    }

    #[test]
    fn json_is_written_as_python_writes_it() {
        let template = ChatTemplate::new("{{ messages | tojson }}", "", "").unwrap();
        let text = template.render(&chat(&[("user", "<é'>")]), false).unwrap();
        assert_eq!(text, r#"[{"role": "user", "content": "<é'>"}]"#);
    }

    #[test]
    fn python_idioms_work() {
        let source = "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% else %}{% set loop_messages = messages %}{% endif %}{% for m in loop_messages %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% if not loop.last %}|{% endif %}{% endfor %}{{ strftime_now('%Y') | length }}{% if tools is defined %}t{% endif %}";
        let template = ChatTemplate::new(source, "", "").unwrap();
        let text = template
            .render(
                &chat(&[("system", "s"), ("user", "a"), ("assistant", "x</think>\nb")]),
                false,
            )
            .unwrap();
        assert_eq!(text, "a|b4");
    }
}
