//! Network namespaces that a test makes for itself, so that it can cut links: this process in one, and others joined to it by
//! two wires each, one for control and one for hand-overs. Nothing of them is left when the processes have ended.

use anyhow::{Context, Result, bail, ensure};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// In the environment of a test that already runs in namespaces of its own.
const INSIDE: &str = "BATON_TEST_NETNS";

/// Where the namespace of this process listens for control and hand-overs.
pub const HERE: Place = Place { index: 0 };

/// A network namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    index: u8,
}

/// One of the two wires of a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    /// Requests, tokens, the store.
    Control,
    /// KV.
    Handover,
}

impl Wire {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Control, Self::Handover];

    fn net(self) -> u8 {
        match self {
            Self::Control => 77,
            Self::Handover => 78,
        }
    }
}

/// Runs the calling test again, alone, in new namespaces, and ends this process with its result; returns where it is in them
/// already. `test`: its name.
///
/// # Errors
/// Why this machine gives none.
pub fn enter(test: &str) -> Result<()> {
    if std::env::var_os(INSIDE).is_some() {
        return Ok(());
    }
    // `ip netns` keeps its names under /run, so that is the test's own too.
    let prepare = "mount -t tmpfs none /run && ip link set lo up && echo 1 > /proc/sys/net/ipv4/ip_forward";
    let mut flags = vec!["--net", "--mount"];
    // Root needs no namespace of users.
    let root = Command::new("id").arg("-u").output().context("run id")?.stdout == b"0\n";
    if !root {
        flags.extend(["--user", "--map-root-user"]);
    }
    let probe = Command::new("unshare")
        .args(&flags)
        .args(["--", "sh", "-c", prepare])
        .output();
    let probe = probe.context("unshare is missing: apt-get install util-linux")?;
    ensure!(
        probe.status.success(),
        "no network namespaces: {}",
        String::from_utf8_lossy(&probe.stderr).trim()
    );
    let this = std::env::current_exe()?;
    let then = format!("{prepare} && exec \"$@\"");
    let error = Command::new("unshare")
        .args(&flags)
        .args(["--", "sh", "-c", &then, "sh"])
        .arg(this)
        .args(["--exact", test, "--nocapture", "--include-ignored"])
        .env(INSIDE, "1")
        .exec();
    bail!("cannot run the test again in a namespace: {error}")
}

/// Gives this namespace its addresses.
///
/// # Errors
/// What `ip` says.
pub fn prepare_here() -> Result<()> {
    Wire::ALL
        .iter()
        .try_for_each(|wire| ip(&format!("addr add {}/32 dev lo", HERE.address(*wire))))
}

impl Place {
    /// Makes a namespace with wires to this one. Each has its own number, from 1.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn new(index: u8) -> Result<Self> {
        ensure!((1..=250).contains(&index), "a place has a number from 1 to 250");
        let place = Self { index };
        let name = place.name();
        ip(&format!("netns add {name}"))?;
        ip(&format!("-n {name} link set lo up"))?;
        for wire in Wire::ALL {
            let (near, far, net) = (place.near(wire), format!("far{}", wire.net()), wire.net());
            ip(&format!("link add {near} type veth peer name {far} netns {name}"))?;
            ip(&format!("addr add 10.{net}.{index}.1/30 dev {near}"))?;
            ip(&format!("link set {near} up"))?;
            ip(&format!("-n {name} addr add {}/30 dev {far}", place.address(wire)))?;
            ip(&format!("-n {name} link set {far} up"))?;
            ip(&format!("-n {name} route add 10.{net}.0.0/16 via 10.{net}.{index}.1"))?;
        }
        Ok(place)
    }

    /// As `ip netns` knows it; this process's own has no name.
    fn name(self) -> String {
        format!("place{}", self.index)
    }

    /// Runs a program there; it has the process id of the command.
    pub fn command(self, program: &Path) -> tokio::process::Command {
        if self == HERE {
            return tokio::process::Command::new(program);
        }
        let mut command = tokio::process::Command::new("ip");
        command.args(["netns", "exec", &self.name()]).arg(program);
        command
    }

    /// Its address on a wire.
    pub fn address(self, wire: Wire) -> String {
        match self.index {
            0 => format!("10.{}.0.1", wire.net()),
            index => format!("10.{}.{index}.2", wire.net()),
        }
    }

    fn near(self, wire: Wire) -> String {
        format!("near{}-{}", wire.net(), self.index)
    }

    /// Nothing goes over the wire any more, in silence; or it does again.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn cut(self, wire: Wire, cut: bool) -> Result<()> {
        ip(&format!(
            "link set {} {}",
            self.near(wire),
            if cut { "down" } else { "up" }
        ))
    }

    /// Lets only so many bits through towards it in a second; none: as many as come.
    ///
    /// # Errors
    /// What `tc` says.
    pub fn slow(self, wire: Wire, rate: Option<&str>) -> Result<()> {
        let near = self.near(wire);
        match rate {
            Some(rate) => run(
                "tc",
                &format!("qdisc add dev {near} root tbf rate {rate} burst 64kbit latency 500ms"),
            ),
            None => run("tc", &format!("qdisc del dev {near} root")),
        }
    }
}

fn ip(arguments: &str) -> Result<()> {
    run("ip", arguments)
}

fn run(program: &str, arguments: &str) -> Result<()> {
    let done = Command::new(program).args(arguments.split(' ')).output();
    let done = done.with_context(|| format!("{program} is missing: apt-get install iproute2"))?;
    ensure!(
        done.status.success(),
        "{program} {arguments}: {}",
        String::from_utf8_lossy(&done.stderr).trim()
    );
    Ok(())
}
