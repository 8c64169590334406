//! Logs and metrics. Logs go to standard error; metrics to one Prometheus recorder that the admin port shows. Both are
//! process-wide by nature and are installed once, by `main`.

use crate::supervisor::panic_message;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

/// Upper bounds of the buckets of every `*_seconds` histogram: 50 us to 2 min.
const SECONDS: [f64; 18] = [
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0,
    60.0, 120.0,
];
/// Upper bounds of the buckets of every `*_bytes` histogram: 4 KiB to 4 GiB.
const BYTES: [f64; 11] = [
    4096.0,
    16384.0,
    65536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
    268_435_456.0,
    1_073_741_824.0,
    4_294_967_296.0,
];

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// A line for people.
    Pretty,
    /// An object per line.
    Json,
}

/// What is logged, and how.
#[derive(Debug, Clone, clap::Args)]
pub struct TelemetryOptions {
    /// How log lines (on standard error) look
    #[arg(
        long,
        value_name = "FORMAT",
        value_enum,
        default_value = "pretty",
        help_heading = "Process"
    )]
    pub log_format: LogFormat,
    /// What is logged: a level, or directives such as `info,baton_kv_transfer=debug`
    #[arg(long, value_name = "FILTER", default_value = "info", help_heading = "Process")]
    pub log_filter: String,
}

/// Telemetry that could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// `--log-filter` is malformed.
    #[error(
        "--log-filter `{filter}`: {reason}; expected a level (error, warn, info, debug, trace) or target=level,..."
    )]
    Filter {
        /// As given.
        filter: String,
        /// What is wrong with it.
        reason: String,
    },
    /// `init` ran before in this process.
    #[error("telemetry is installed already")]
    Installed,
}

impl TelemetryError {
    /// Neither passes by itself.
    pub fn is_retryable(&self) -> bool {
        false
    }
}

/// The process's metrics, to be shown by the admin port. Clones share them.
#[derive(Clone)]
pub struct Metrics(PrometheusHandle);

impl Metrics {
    /// Metrics that nothing records into, for processes that hold several roles and for tests.
    pub fn detached() -> Self {
        Self(recorder().handle())
    }

    /// In Prometheus's text form.
    pub fn render(&self) -> String {
        self.0.render()
    }

    /// Folds what was recorded since the last call, so that it does not pile up while nobody looks.
    pub(crate) fn upkeep(&self) {
        self.0.run_upkeep();
    }
}

/// Installs logs, metrics and a panic hook that logs. Once per process.
///
/// # Errors
/// A malformed filter, or a second call.
pub fn init(options: &TelemetryOptions) -> Result<Metrics, TelemetryError> {
    let filter = EnvFilter::try_new(&options.log_filter).map_err(|e| TelemetryError::Filter {
        filter: options.log_filter.clone(),
        reason: e.to_string(),
    })?;
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let installed = match options.log_format {
        LogFormat::Pretty => logs.with_ansi(std::io::stderr().is_terminal()).compact().try_init(),
        LogFormat::Json => logs.json().flatten_event(true).try_init(),
    };
    installed.map_err(|_| TelemetryError::Installed)?;
    let recorder = recorder();
    let metrics = Metrics(recorder.handle());
    metrics::set_global_recorder(recorder).map_err(|_| TelemetryError::Installed)?;
    metrics::describe_counter!(
        "baton_runtime_task_panics_total",
        "Tasks that panicked; each ends the process"
    );
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(place, error = panic_message(info.payload()), "panic");
    }));
    Ok(metrics)
}

fn recorder() -> PrometheusRecorder {
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)
        .and_then(|builder| builder.set_buckets_for_metric(Matcher::Suffix("_bytes".to_owned()), &BYTES))
        .expect("the bounds are not empty")
        .build_recorder()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_have_buckets() {
        let recorder = recorder();
        let metrics = Metrics(recorder.handle());
        metrics::with_local_recorder(&recorder, || metrics::histogram!("baton_x_wait_seconds").record(0.003));
        metrics.upkeep();
        let text = metrics.render();
        assert!(text.contains(r#"baton_x_wait_seconds_bucket{le="0.005"} 1"#), "{text}");
    }

    #[test]
    fn a_bad_filter_is_an_error() {
        let options = TelemetryOptions {
            log_format: LogFormat::Pretty,
            log_filter: "a=b=c".to_owned(),
        };
        let error = init(&options).err().map(|e| e.to_string()).unwrap();
        assert!(error.contains("--log-filter `a=b=c`"), "{error}");
    }
}
