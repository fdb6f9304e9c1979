//! The machine of the run.

use crate::bench::Bench;

const VERSIONS: &str = include_str!("../../Cargo.lock");

/// Prints it on stderr.
pub(crate) fn describe(bench: &Bench) {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let os = std::env::consts::OS;
    let arch = std::env::consts::ARCH;
    eprintln!("machine: {cpus} CPUs ({}), {os} {arch}", cpu().unwrap_or("unknown".into()));
    if let Ok(load) = std::fs::read_to_string("/proc/loadavg") {
        let load: Vec<_> = load.split(' ').take(3).collect();
        eprintln!("load before: {}", load.join(" "));
    }
    let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
    let store = "tower-sessions-moka-mongodb-store";
    eprintln!("build: {profile}, {store} {}", version(store).unwrap_or("unknown"));
    let of = |name| format!("{name} {}", version(name).unwrap_or("unknown"));
    eprintln!("with: {}", ["mongodb", "moka", "tower-sessions", "tokio"].map(of).join(", "));
    eprintln!("server: {}", bench.server.description());
    eprintln!("rounds: {}", bench.rounds);
    if cfg!(debug_assertions) {
        eprintln!(
            "WARNING: debug assertions are on; nothing here says how fast a release build is"
        );
    }
    if bench.quick {
        eprintln!("WARNING: --quick shows that everything runs; its figures are no measurement");
    } else if bench.rounds < 7 || bench.rounds.is_multiple_of(2) {
        eprintln!("WARNING: take an odd number of rounds, 7 at least");
    }
}

fn cpu() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn version(name: &str) -> Option<&'static str> {
    // The last of several versions is the newest.
    let (_, after) = VERSIONS.rsplit_once(&format!("name = \"{name}\"\nversion = \""))?;
    after.split('"').next()
}
