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
    let command = command.mut_args(|arg| {
        let named = !matches!(arg.get_id().as_str(), "print_config" | "help" | "version");
        let Some(key) = key_of(&arg).filter(|_| named && arg.get_env().is_none()) else {
            return arg;
        };
        let arg = arg.env(format!("BATON_{}", key.to_uppercase()));
        // In the environment and the file a switch is written as people do: true, yes, on, 1.
        if is_switch(&arg) {
            arg.value_parser(clap::builder::BoolishValueParser::new())
        } else {
            arg
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use std::path::Path;

    #[derive(Debug, clap::Parser)]
    struct Tool {
        #[command(subcommand)]
        command: Verb,
    }

    #[derive(Debug, clap::Subcommand)]
    enum Verb {
        /// Serves
        Serve(Serve),
        /// Asks
        Ask { question: String },
    }

    #[derive(Debug, clap::Args)]
    struct Serve {
        /// How much
        #[arg(long, value_parser = crate::parse_bytes, default_value = "1GiB")]
        test_kv_bytes: u64,
        #[arg(long)]
        test_role: String,
        #[arg(long)]
        test_verbose: bool,
        #[arg(long, value_delimiter = ',')]
        test_peers: Vec<String>,
        #[arg(long, hide_env_values = true)]
        test_password: Option<String>,
        #[command(flatten)]
        config: ConfigOptions,
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    fn serve(path: &Path, more: &[&str]) -> Result<Serve, ConfigError> {
        let mut args = vec!["tool", "serve", "--config", path.to_str().unwrap()];
        args.extend(more);
        parse_from::<Tool>(args).map(|tool| match tool.command {
            Verb::Serve(serve) => serve,
            Verb::Ask { question } => panic!("{question}"),
        })
    }

    #[test]
    fn the_file_lies_under_the_flags_and_over_the_defaults() {
        let file = file(
            "test_kv_bytes = \"2GiB\"\ntest_role = \"decode\"\ntest_verbose = true\ntest_peers = [\"a\", \"b\"]\n",
        );
        let options = serve(file.path(), &["--test-role", "prefill"]).unwrap();
        assert_eq!(options.test_kv_bytes, 2 << 30);
        assert_eq!(options.test_role, "prefill");
        assert!(options.test_verbose);
        assert_eq!(options.test_peers, ["a", "b"]);
        assert_eq!(options.config.config.as_deref(), Some(file.path()));
        let off = super::tests::file("test_verbose = \"off\"\n");
        assert!(!serve(off.path(), &["--test-role", "x"]).unwrap().test_verbose);
    }

    #[test]
    fn an_unknown_key_names_the_nearest() {
        let file = file("test_kv_byte = 5\n");
        let error = serve(file.path(), &["--test-role", "x"]).unwrap_err().to_string();
        assert!(
            error.contains("unknown key `test_kv_byte`; did you mean `test_kv_bytes`?"),
            "{error}"
        );
        let tables = super::tests::file("[test_peers]\na = 1\n");
        let error = serve(tables.path(), &["--test-role", "x"]).unwrap_err().to_string();
        assert!(error.contains("`test_peers` must be"), "{error}");
        // The file belongs to one command: keys of others are unknown, and so is the file's own flag.
        let meta = super::tests::file("config = \"x\"\n");
        assert!(
            serve(meta.path(), &["--test-role", "x"])
                .unwrap_err()
                .to_string()
                .contains("unknown key `config`")
        );
    }

    #[test]
    fn a_bad_value_says_that_it_comes_from_the_file() {
        let file = file("test_kv_bytes = \"much\"\n");
        let error = serve(file.path(), &["--test-role", "x"]).unwrap_err().to_string();
        assert!(
            error.contains("--test-kv-bytes") && error.contains("the value comes from"),
            "{error}"
        );
        assert!(error.contains("512MiB"), "{error}");
        let missing = serve(Path::new("/nowhere/baton.toml"), &[]).unwrap_err().to_string();
        assert!(
            missing.contains("cannot read the configuration file /nowhere/baton.toml"),
            "{missing}"
        );
    }

    #[test]
    fn every_flag_has_a_variable() {
        let command = with_environment(Tool::command());
        let serve = command.find_subcommand("serve").unwrap();
        let variable = |id: &str| {
            let arg = serve.get_arguments().find(|arg| arg.get_id() == id).unwrap();
            arg.get_env().map(|name| name.to_string_lossy().into_owned())
        };
        assert_eq!(variable("test_kv_bytes").as_deref(), Some("BATON_TEST_KV_BYTES"));
        assert_eq!(variable("config").as_deref(), Some("BATON_CONFIG"));
        assert_eq!(variable("print_config"), None);
        command.debug_assert();
    }

    #[test]
    fn the_printed_configuration_reads_back() {
        let first = file("test_role = \"decode\"\ntest_password = \"hush\"\n");
        let more = ["--print-config", "--test-kv-bytes", "4096", "--test-peers", "a,b"];
        let Err(ConfigError::Print(toml)) = serve(first.path(), &more) else {
            panic!("no print")
        };
        assert!(toml.contains("test_kv_bytes = 4096 # flag"), "{toml}");
        assert!(toml.contains("test_role = \"decode\" # file"), "{toml}");
        assert!(toml.contains("test_verbose = false # default"), "{toml}");
        assert!(!toml.contains("hush"), "{toml}");
        let again = file(&toml);
        let options = serve(again.path(), &[]).unwrap();
        assert_eq!((options.test_kv_bytes, options.test_role.as_str()), (4096, "decode"));
        assert_eq!(options.test_peers, ["a", "b"]);
    }

    #[test]
    fn commands_without_a_file_are_left_alone() {
        let tool = parse_from::<Tool>(["tool", "ask", "why"]).unwrap();
        assert!(matches!(tool.command, Verb::Ask { question } if question == "why"));
        let help = parse_from::<Tool>(["tool", "serve", "--help"]).unwrap_err().to_string();
        assert!(help.contains("BATON_TEST_KV_BYTES") && help.contains("1GiB"), "{help}");
    }
}
