//! The layers. The environment and the file are laid under the flags by changing the clap command before it parses: each
//! flag gets the variable `BATON_<FLAG>` and, where the file names it, the file's value as its default.

use super::{ConfigFileError, file, print};
use clap::{ArgAction, ArgMatches, Command, Parser};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::PathBuf;

/// Flatten it into the options of a command that can be configured by file.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ConfigOptions {
    /// TOML file with defaults for these flags; keys are flag names with `_` for `-`
    #[arg(long, value_name = "FILE", help_heading = "Process")]
    pub config: Option<PathBuf>,
    /// Prints the effective configuration as TOML, with where each value comes from, and exits
    #[arg(long, help_heading = "Process")]
    pub print_config: bool,
}

/// A command line, environment or file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file.
    #[error("error: {0}")]
    File(#[from] ConfigFileError),
    /// The flags or the environment; also the answer to `--help` and `--version`.
    #[error("{0}")]
    Flags(#[from] clap::Error),
    /// A value of the file that its flag does not accept.
    #[error("{error}\nnote: the value comes from {path}")]
    FileValue {
        /// What is wrong with it.
        error: clap::Error,
        /// The file.
        path: PathBuf,
    },
    /// `--print-config` was given: this is the answer.
    #[error("{0}")]
    Print(String),
}

impl ConfigError {
    /// Nothing changes by trying again.
    pub fn is_retryable(&self) -> bool {
        false
    }

    /// Prints it where it belongs and ends the process with the fitting code.
    pub fn exit(self) -> ! {
        match self {
            Self::Flags(error) => error.exit(),
            Self::Print(toml) => {
                print!("{toml}");
                std::process::exit(0)
            }
            error @ (Self::File(_) | Self::FileValue { .. }) => {
                eprintln!("{error}");
                std::process::exit(2)
            }
        }
    }
}

/// Parses this process's command line; ends the process on an error, `--help`, `--version` and `--print-config`.
pub fn parse<T: Parser>() -> T {
    parse_from(std::env::args_os()).unwrap_or_else(|error| error.exit())
}

/// Parses `args`, of which the first is the program's name.
///
/// # Errors
/// Whatever is wrong, and answers that are no options (help, version, the printed configuration).
pub fn parse_from<T: Parser>(args: impl IntoIterator<Item = impl Into<OsString>>) -> Result<T, ConfigError> {
    let args: Vec<OsString> = args.into_iter().map(Into::into).collect();
    let command = with_environment(T::command());
    let Some(path) = config_path(&command, &args) else {
        return finish(command, &args, &BTreeSet::new());
    };
    // The keys are those of the command that is run, so the file is laid under that one only.
    let names = chosen_path(&command, &args);
    let chosen = descend(&command, &names);
    let values = file::read(&path, &keys(chosen))?;
    let from_file: BTreeSet<String> = values.keys().cloned().collect();
    let layered = change(command.clone(), &names, &|command| with_defaults(command, &values));
    finish(layered, &args, &from_file).map_err(|error| match error {
        ConfigError::Flags(error) if error.use_stderr() && command.try_get_matches_from(&args).is_ok() => {
            ConfigError::FileValue { error, path }
        }
        other => other,
    })
}

fn finish<T: Parser>(command: Command, args: &[OsString], from_file: &BTreeSet<String>) -> Result<T, ConfigError> {
    let mut matches = command.clone().try_get_matches_from(args)?;
    let names = subcommand_names(&matches);
    let (chosen, chosen_matches) = (descend(&command, &names), innermost(&matches));
    if chosen.get_arguments().any(|arg| arg.get_id() == "print_config") && chosen_matches.get_flag("print_config") {
        return Err(ConfigError::Print(print::effective(chosen, chosen_matches, from_file)));
    }
    let options = T::from_arg_matches_mut(&mut matches).map_err(|error| error.format(&mut command.clone()))?;
    Ok(options)
}

/// The TOML key of a flag.
pub(super) fn key_of(arg: &clap::Arg) -> Option<String> {
    arg.get_long().map(|long| long.replace('-', "_"))
}

fn is_meta(arg: &clap::Arg) -> bool {
    matches!(arg.get_id().as_str(), "config" | "print_config" | "help" | "version")
}

fn keys(command: &Command) -> Vec<String> {
    command
        .get_arguments()
        .filter(|arg| !is_meta(arg))
        .filter_map(key_of)
        .collect()
}

/// Gives every flag of every command its variable.
fn with_environment(command: Command) -> Command {
    let command = command.mut_args(|arg| match key_of(&arg) {
        Some(key)
            if arg.get_env().is_none() && !matches!(arg.get_id().as_str(), "print_config" | "help" | "version") =>
        {
            arg.env(format!("BATON_{}", key.to_uppercase()))
        }
        _ => arg,
    });
    command.mut_subcommands(with_environment)
}

fn with_defaults(command: Command, values: &BTreeMap<String, Vec<String>>) -> Command {
    command.mut_args(|arg| match key_of(&arg).and_then(|key| values.get(&key)) {
        Some(texts) => arg.required(false).default_values(texts.clone()),
        None => arg,
    })
}

/// The file that the chosen command is given, where it takes one.
fn config_path(command: &Command, args: &[OsString]) -> Option<PathBuf> {
    let matches = command.clone().ignore_errors(true).try_get_matches_from(args).ok()?;
    let matches = innermost(&matches);
    matches.try_get_one::<PathBuf>("config").ok().flatten().cloned()
}

fn chosen_path(command: &Command, args: &[OsString]) -> Vec<String> {
    let matches = command.clone().ignore_errors(true).try_get_matches_from(args);
    matches.map(|matches| subcommand_names(&matches)).unwrap_or_default()
}

fn subcommand_names(matches: &ArgMatches) -> Vec<String> {
    let mut names = Vec::new();
    let mut here = matches;
    while let Some((name, inner)) = here.subcommand() {
        names.push(name.to_owned());
        here = inner;
    }
    names
}

fn innermost(matches: &ArgMatches) -> &ArgMatches {
    matches.subcommand().map_or(matches, |(_, inner)| innermost(inner))
}

fn descend<'a>(command: &'a Command, names: &[String]) -> &'a Command {
    names
        .iter()
        .fold(command, |here, name| here.find_subcommand(name).unwrap_or(here))
}

fn change(command: Command, names: &[String], with: &dyn Fn(Command) -> Command) -> Command {
    match names.split_first() {
        None => with(command),
        Some((first, rest)) => command.mut_subcommand(first.clone(), |sub| change(sub, rest, with)),
    }
}

/// Whether a flag takes no value.
pub(super) fn is_switch(arg: &clap::Arg) -> bool {
    matches!(arg.get_action(), ArgAction::SetTrue | ArgAction::SetFalse)
}
