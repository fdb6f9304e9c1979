//! The machine and the software of the run.

use std::collections::BTreeMap;
use std::process::Command;
use std::thread;

use serde::Serialize;
use session_test_server::TestServer;
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};

use crate::number::float;

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) processor: String,
    pub(crate) cores: usize,
    pub(crate) memory_bytes: u64,
    pub(crate) system: String,
    pub(crate) rustc: String,
    pub(crate) build: &'static str,
    /// The versions of this crate and of the crates that affect the figures.
    pub(crate) versions: BTreeMap<String, String>,
    pub(crate) mongo: String,
    pub(crate) command: String,
}

const WATCHED: [&str; 9] = [
    "axum",
    "hyper",
    "moka",
    "mongodb",
    "tokio",
    "tower-sessions",
    "tower-sessions-core",
    "tower-sessions-memory-store",
    "tower-sessions-moka-mongodb-store",
];

pub(crate) fn is_optimised() -> bool {
    !cfg!(debug_assertions)
}

impl Machine {
    pub(crate) fn of(mongo: &TestServer) -> Self {
        let what = RefreshKind::nothing()
            .with_cpu(CpuRefreshKind::nothing())
            .with_memory(MemoryRefreshKind::nothing().with_ram());
        let system = System::new_with_specifics(what);
        let processor = system.cpus().first().map(|cpu| cpu.brand().trim().to_owned());
        let arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
        Self {
            processor: processor.unwrap_or_default(),
            cores: thread::available_parallelism().map_or(1, Into::into),
            memory_bytes: system.total_memory(),
            system: format!(
                "{}, {}",
                System::long_os_version().unwrap_or_default(),
                System::kernel_long_version()
            ),
            rustc: rustc(),
            build: if is_optimised() { "release" } else { "debug" },
            versions: versions(),
            mongo: mongo.description(),
            command: ["cargo bench --bench load --".to_owned()]
                .into_iter()
                .chain(arguments)
                .collect::<Vec<_>>()
                .join(" "),
        }
    }

    /// A line for each part: its name and its text.
    pub(crate) fn lines(&self) -> Vec<(&'static str, String)> {
        let gigabytes = float(self.memory_bytes) / f64::from(1 << 30);
        let versions: Vec<_> =
            self.versions.iter().map(|(name, version)| format!("{name} {version}")).collect();
        vec![
            ("machine", format!("{}, {} cores, {gigabytes:.0} GiB", self.processor, self.cores)),
            ("system", self.system.clone()),
            ("MongoDB", self.mongo.clone()),
            ("build", format!("{}, {}", self.build, self.rustc)),
            ("versions", versions.join(", ")),
            ("command", self.command.clone()),
        ]
    }
}

/// The compiler on PATH, which usually has built this program.
fn rustc() -> String {
    let said = Command::new("rustc").arg("--version").output();
    let said = said.ok().and_then(|output| String::from_utf8(output.stdout).ok());
    said.map_or_else(|| "rustc unknown".to_owned(), |text| text.trim().to_owned())
}

/// If a crate occurs twice, the newer version, which is the second in the file.
fn versions() -> BTreeMap<String, String> {
    let quoted = |line: &str, key: &str| -> Option<String> {
        Some(line.strip_prefix(key)?.trim_matches('"').to_owned())
    };
    let lock = include_str!("../../Cargo.lock");
    let mut lines = lock.lines();
    let mut found = BTreeMap::new();
    while let Some(line) = lines.next() {
        if let Some(name) = quoted(line, "name = ").filter(|name| WATCHED.contains(&name.as_str()))
            && let Some(version) = lines.next().and_then(|line| quoted(line, "version = "))
        {
            found.insert(name, version);
        }
    }
    found
}
