//! Which cluster a command talks to. `baton up` leaves its coordinator's address in a file of this user's, so that
//! `chat` and `status` find it without being told.

use anyhow::{Context, Result, bail};
use rustix::process::getuid;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::PathBuf;
use std::time::Duration;
use tonic::transport::{Channel, Endpoint};

/// Where a coordinator's gRPC door is unless told otherwise.
pub const DEFAULT_GRPC: &str = "127.0.0.1:8001";

/// Which cluster to talk to.
#[derive(Debug, Clone, clap::Args)]
pub struct EndpointOptions {
    /// gRPC address of the coordinator [default: that of the last `baton up` of this user, else 127.0.0.1:8001]
    #[arg(long, value_name = "HOST:PORT")]
    pub endpoint: Option<String>,
}

impl EndpointOptions {
    /// Connects, and gives the address too.
    pub async fn connect(&self) -> Result<(Channel, String)> {
        let address = match &self.endpoint {
            Some(address) => address.trim_start_matches("http://").trim_end_matches('/').to_owned(),
            None => last().unwrap_or_else(|| DEFAULT_GRPC.to_owned()),
        };
        let channel = connect(&address).await.with_context(|| {
            format!("no coordinator answers at {address}: start a cluster with `baton up`, or name one with --endpoint")
        })?;
        Ok((channel, address))
    }
}

/// Connects to `host:port`.
pub async fn connect(address: &str) -> Result<Channel> {
    let Ok(endpoint) = Endpoint::from_shared(format!("http://{address}")) else {
        bail!("`{address}` is no address: expected HOST:PORT");
    };
    Ok(endpoint.connect_timeout(Duration::from_secs(5)).connect().await?)
}

/// What a status says to a person: its message, and when to come again where it tells.
pub fn explain(status: &tonic::Status) -> String {
    let again = status
        .metadata()
        .get("retry-after-ms")
        .and_then(|value| value.to_str().ok());
    let again = again.map(|ms| format!(" (try again in {ms} ms)")).unwrap_or_default();
    let message = if status.message().is_empty() {
        "no reason given"
    } else {
        status.message()
    };
    format!("{message}{again} [{:?}]", status.code())
}

/// The note of a running cluster's address; it is taken away when this is dropped.
pub struct Note {
    path: PathBuf,
    address: String,
}

impl Note {
    /// Leaves the note. Where that is not possible, commands have to be told the address: no reason to fail.
    pub fn leave(address: &str) -> Option<Self> {
        let path = path()?;
        let written = path.with_extension(std::process::id().to_string());
        std::fs::write(&written, address)
            .and_then(|()| std::fs::rename(&written, &path))
            .ok()?;
        Some(Self {
            path,
            address: address.to_owned(),
        })
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        // A later cluster's note stays.
        if std::fs::read_to_string(&self.path).is_ok_and(|found| found == self.address) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn last() -> Option<String> {
    let text = std::fs::read_to_string(path()?).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// `$XDG_RUNTIME_DIR/baton/last-endpoint`, or the same under the temporary folder; none where that is another user's.
fn path() -> Option<PathBuf> {
    let uid = getuid().as_raw();
    let folder = match std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty()) {
        Some(folder) => PathBuf::from(folder).join("baton"),
        None => std::env::temp_dir().join(format!("baton-{uid}")),
    };
    let _ = std::fs::DirBuilder::new().mode(0o700).create(&folder);
    let found = std::fs::symlink_metadata(&folder).ok()?;
    (found.is_dir() && found.uid() == uid && found.mode() & 0o022 == 0).then(|| folder.join("last-endpoint"))
}
