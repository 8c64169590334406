//! An etcd behind TLS that wants a client certificate.

use crate::backend::Backend;
use crate::support::{View, record};
use baton_cluster_state::{Store, StoreError, StoreOptions};
use baton_node_runtime::{Clock, Supervisor};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// An authority and what it signed, in files.
struct Files {
    folder: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        let files = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
        files.write("ca", &authority.pem());
        for name in ["server", "client"] {
            let key = KeyPair::generate().unwrap();
            let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
            let signed = CertificateParams::new(names)
                .unwrap()
                .signed_by(&key, &authority)
                .unwrap();
            files.write(name, &signed.pem());
            files.write(&format!("{name}.key"), &key.serialize_pem());
        }
        files
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

async fn connect(options: StoreOptions) -> Result<Store, StoreError> {
    Store::connect(options, Clock::new(), Supervisor::new()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_shown_and_checked() {
    let (files, strangers) = (Files::new(), Files::new());
    let flag = |flag: &str, file: &str| [flag.to_owned(), files.path(file).display().to_string()];
    let flags = [
        flag("--cert-file", "server"),
        flag("--key-file", "server.key"),
        flag("--trusted-ca-file", "ca"),
    ];
    let flags = [flags.concat(), vec!["--client-cert-auth".to_owned()]].concat();
    let backend = Backend::etcd_with_tls(flags).await;
    let options = |ca: PathBuf, cert: Option<PathBuf>, key: Option<PathBuf>| StoreOptions {
        ca: Some(ca),
        cert,
        key,
        connect_timeout: Duration::from_secs(20),
        ..backend.options()
    };
    let client = || (Some(files.path("client")), Some(files.path("client.key")));
    let (cert, key) = client();
    let store = connect(options(files.path("ca"), cert, key)).await.unwrap();
    let mut view = View::new(store.watch_nodes());
    let registration = store.register(record("a")).await.unwrap();
    view.follow_until("the node", |members| members.len() == 1).await;
    assert!(registration.is_published());

    let quickly = |options: StoreOptions| StoreOptions {
        connect_timeout: Duration::from_secs(1),
        ..options
    };
    let (cert, key) = client();
    let error = connect(quickly(options(strangers.path("ca"), cert, key)))
        .await
        .map(|_| ())
        .unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    let refused = connect(quickly(options(files.path("ca"), None, None)))
        .await
        .map(|_| ());
    assert!(refused.is_err(), "etcd wants a client certificate");
    let plain = connect(StoreOptions {
        connect_timeout: Duration::from_secs(1),
        ..backend.options()
    })
    .await;
    assert!(plain.is_err(), "etcd wants TLS");

    let missing = connect(options(PathBuf::from("/nowhere/ca.pem"), None, None))
        .await
        .map(|_| ())
        .unwrap_err();
    assert!(
        matches!(&missing, StoreError::TlsFile { option: "--etcd-ca", path, .. } if path == Path::new("/nowhere/ca.pem"))
    );
    let half = connect(options(files.path("ca"), Some(files.path("client")), None))
        .await
        .map(|_| ())
        .unwrap_err();
    assert!(
        matches!(
            half,
            StoreError::InvalidOption {
                option: "--etcd-cert",
                ..
            }
        ),
        "{half}"
    );
}
