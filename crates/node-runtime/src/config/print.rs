//! `--print-config`: what a command would run with, as a file that it would accept.

use super::layers::{is_switch, key_of};
use clap::parser::ValueSource;
use clap::{ArgAction, ArgMatches, Command};
use std::collections::BTreeSet;
use std::fmt::Write;

/// The effective configuration of a command as TOML. Secrets, which are the flags whose
/// environment values clap hides, are left out.
pub(super) fn effective(command: &Command, matches: &ArgMatches, from_file: &BTreeSet<String>) -> String {
    let mut out = String::new();
    for arg in command.get_arguments() {
        let id = arg.get_id().as_str();
        let Some(key) = key_of(arg) else { continue };
        if matches!(id, "config" | "print_config" | "help" | "version") {
            continue;
        }
        let source = match matches.value_source(id) {
            Some(ValueSource::CommandLine) => "flag".to_owned(),
            Some(ValueSource::EnvVariable) => {
                format!("environment {}", arg.get_env().unwrap_or_default().to_string_lossy())
            }
            Some(_) if from_file.contains(&key) => "file".to_owned(),
            Some(_) => "default".to_owned(),
            None => {
                let _ = writeln!(out, "# {key} is not set");
                continue;
            }
        };
        if arg.is_hide_env_values_set() {
            let _ = writeln!(out, "# {key} is set by {source}");
            continue;
        }
        let value = if is_switch(arg) {
            toml::Value::Boolean(matches.get_flag(id))
        } else {
            let texts: Vec<String> = matches
                .get_raw(id)
                .into_iter()
                .flatten()
                .map(|raw| raw.to_string_lossy().into_owned())
                .collect();
            match (texts.as_slice(), arg.get_action()) {
                ([one], ArgAction::Set) => scalar(one),
                (many, _) => toml::Value::Array(many.iter().map(|text| scalar(text)).collect()),
            }
        };
        let _ = writeln!(out, "{key} = {value} # {source}");
    }
    out
}

fn scalar(text: &str) -> toml::Value {
    match text.parse::<i64>() {
        // Only what reads back the same, so that a name such as `007` stays a name.
        Ok(number) if number.to_string() == text => toml::Value::Integer(number),
        _ => toml::Value::String(text.to_owned()),
    }
}
