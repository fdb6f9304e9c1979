//! `examples/observability` with a real Prometheus: what it scrapes, its rules and alerts, and the
//! dashboard.
//!
//! If `prometheus` and `promtool` are not installed (Debian's package is `prometheus`), these tests
//! print that and do nothing, unless `REQUIRE_PROMETHEUS` is set.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests, which may panic")]

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};

use crate::app::{App, Visitor};
use crate::common::{self, PATIENCE, eventually};

/// The share of loads from memory, by instance.
const HIT_RATE: &str = "instance_store:session_store_loads_hit:ratio_rate5m";

#[tokio::test]
async fn promtool_accepts_the_configuration_and_every_rule_passes_its_test() {
    let Some(promtool) = tool("promtool") else { return };
    for (check, file) in [
        (["check", "config"], "prometheus.yml"),
        (["check", "rules"], "rules.yml"),
        (["test", "rules"], "rules_test.yml"),
    ] {
        let mut checks = Command::new(&promtool);
        checks.args(check).arg(in_example(file));
        let said = checks.output().await.unwrap();
        let said_so = String::from_utf8_lossy(&said.stdout) + String::from_utf8_lossy(&said.stderr);
        assert!(said.status.success(), "{check:?} {file}: {said_so}");
    }
}

#[tokio::test]
async fn promtool_accepts_a_scrape() {
    let Some(promtool) = tool("promtool") else { return };
    let app = App::start("observability", &common::uri()).await;
    let load = Load::of(&app).await;
    let scrape = load.scrape(&app).await;
    let mut checks = Command::new(&promtool);
    checks.args(["check", "metrics"]).stdin(Stdio::piped());
    let mut checks = checks.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = checks.stdin.take().unwrap();
    stdin.write_all(scrape.as_bytes()).await.unwrap();
    drop(stdin);
    let said = checks.wait_with_output().await.unwrap();
    let said_so = String::from_utf8_lossy(&said.stdout) + String::from_utf8_lossy(&said.stderr);
    assert!(said.status.success() && said_so.is_empty(), "{said_so}\nof\n{scrape}");
}

#[tokio::test]
async fn every_metric_in_the_example_exists() {
    let app = App::start("observability", &common::uri()).await;
    let scrape = Load::of(&app).await.scrape(&app).await;
    let emitted = emitted(&scrape);
    let rules = read("rules.yml");
    let recorded: BTreeSet<_> =
        rules.lines().filter_map(|line| line.trim().strip_prefix("- record: ")).collect();
    assert!(recorded.contains(HIT_RATE), "{recorded:?}");
    let mut named = BTreeSet::new();
    for file in ["prometheus.yml", "rules.yml", "rules_test.yml", "grafana-dashboard.json"] {
        for name in names(&read(file)) {
            if name.contains(':') {
                assert!(recorded.contains(name.as_str()), "{file}: no rule records {name}");
            } else {
                let exists = emitted.contains(&name);
                assert!(exists, "{file} names {name}, which is not among {emitted:?}");
                named.insert(name);
            }
        }
    }
    assert!(named.len() > 15, "{named:?}");
}

#[tokio::test]
async fn real_prometheus_computes_the_hit_rate_and_the_dashboard() {
    let Some(prometheus) = tool("prometheus") else { return };
    // No lease expires in this test, so the result of each load is known.
    let app = App::start_with("observability", &common::uri(), &[("MAX_STALENESS", "3600")]).await;
    let prometheus = Prometheus::start(&prometheus, &app).await;
    // Prometheus scrapes the series at zero first, so that each increase counts in its rates.
    let zero = async || prometheus.value("sum(session_store_loads_total)").await == Some(0.0);
    eventually("Prometheus has scraped the app", zero).await;

    let load = Load::of(&app).await;
    let all = f64::from(load.all());
    let from_memory = f64::from(load.without_a_read());
    let total = async || {
        let total = prometheus.value("sum(session_store_loads_total)").await.unwrap_or(0.0);
        assert!(total <= all, "{total} loads were counted of {all}");
        is(total, all)
    };
    eventually("Prometheus has seen every load", total).await;
    let seen_at = prometheus.value("max(timestamp(session_store_loads_total))").await.unwrap();
    let hit_rate = format!("timestamp({HIT_RATE})");
    let ruled = async || prometheus.value(&hit_rate).await.is_some_and(|at| at > seen_at);
    eventually("the rule has been evaluated since", ruled).await;
    let rate = prometheus.value(HIT_RATE).await.unwrap();
    assert!(is(rate, from_memory / all), "{rate}, and {from_memory} of {all} were from memory");

    let emitted = emitted(&load.scrape(&app).await);
    for (title, expression) in dashboard() {
        prometheus.query(&expression).await;
        if names(&expression).iter().all(|name| name.contains(':') || emitted.contains(name)) {
            // A panel leaves out series that are zero, such as the causes of gaps that did not
            // occur.
            let values = prometheus.query(&expression.replace("> 0", "")).await;
            assert!(!values.is_empty(), "{title} shows nothing: {expression}");
        }
        if title == "Hit rate" {
            let rate = prometheus.value(&expression).await;
            assert!(rate.is_some_and(|rate| is(rate, from_memory / all)), "{rate:?}");
        }
    }
    prometheus.every_rule_is_well_and_no_alert_fires().await;
}

/// Loads that the visitors of an app make, one after the other.
struct Load {
    hits: u32,
    misses: u32,
    absent: u32,
}

impl Load {
    async fn of(app: &App) -> Self {
        let mut hits = 0;
        let mut misses = 0;
        let mut absent = 0;
        for _ in 0..5 {
            let visitor = Visitor::new();
            // The first visitor has no cookie, so there is nothing to load.
            visitor.page(app, "/").await;
            for _ in 0..9 {
                assert_eq!(visitor.page(app, "/views").await, "1\n");
                hits += 1;
            }
        }
        for stranger in 0..10 {
            let id = format!("{stranger}AAAAAAAAAAAAAAAAAAAAA");
            let stranger = Visitor::with_cookie(app, &id);
            assert_eq!(stranger.page(app, "/views").await, "0\n");
            misses += 1;
        }
        for _ in 0..5 {
            // A new browser each time, since the response removes the cookie.
            let again = Visitor::with_cookie(app, "0AAAAAAAAAAAAAAAAAAAAA");
            assert_eq!(again.page(app, "/views").await, "0\n");
            absent += 1;
        }
        Self { hits, misses, absent }
    }

    fn all(&self) -> u32 {
        self.hits + self.misses + self.absent
    }

    fn without_a_read(&self) -> u32 {
        self.hits + self.absent
    }

    /// The app's metrics after these loads. The scrape itself may change them.
    async fn scrape(&self, app: &App) -> String {
        let scrape = Visitor::new().page(app, "/metrics").await;
        let loads = scrape.lines().filter(|line| line.starts_with("session_store_loads_total{"));
        let counts = loads.map(|line| line.rsplit(' ').next().unwrap().parse::<u32>().unwrap());
        assert_eq!(counts.sum::<u32>(), self.all(), "{scrape}");
        scrape
    }
}

/// The metrics of a scrape, without the `_bucket`, `_sum` and `_count` of histograms.
fn emitted(scrape: &str) -> BTreeSet<String> {
    let types = scrape.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    types.map(|line| line.split(' ').next().unwrap().to_owned()).collect()
}

/// The store's metrics that a text names. A histogram counts under its own name, without the
/// suffixes of its series.
fn names(text: &str) -> BTreeSet<String> {
    let tokens = text.split(|it: char| !it.is_ascii_alphanumeric() && it != '_' && it != ':');
    let named = tokens.filter(|token| token.contains("session_store_"));
    let whole = named.map(|name| {
        let part = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
        part.unwrap_or(name).to_owned()
    });
    whole.collect()
}

/// Each title and expression of the dashboard, as Grafana sends it with the default values of its
/// variables.
fn dashboard() -> Vec<(String, String)> {
    let dashboard: Value = serde_json::from_str(&read("grafana-dashboard.json")).unwrap();
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    assert!(variables.iter().any(|it| it["name"] == "store" && it["allValue"] == ".*"));
    let mut all = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let mut expression = target["expr"].as_str().unwrap().replace("$__rate_interval", "1m");
            for variable in variables {
                let name = format!("${}", variable["name"].as_str().unwrap());
                expression = expression.replace(&name, ".*");
            }
            assert!(!expression.contains('$'), "{expression}");
            all.push((panel["title"].as_str().unwrap().to_owned(), expression));
        }
    }
    assert!(all.len() > 20);
    all
}

fn read(file: &str) -> String {
    std::fs::read_to_string(in_example(file)).unwrap()
}

fn in_example(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/observability").join(file)
}

/// The program, if it is installed. Prints past the test's captured output if it is not.
fn tool(name: &str) -> Option<String> {
    let said = std::process::Command::new(name).arg("--version").output();
    if said.is_ok_and(|said| said.status.success()) {
        return Some(name.to_owned());
    }
    let how = "to install it: apt-get install prometheus (Debian, Ubuntu)";
    assert!(std::env::var_os("REQUIRE_PROMETHEUS").is_none(), "there is no {name}; {how}");
    let mut stderr = std::io::stderr();
    writeln!(stderr, "there is no {name}, so a test was skipped; {how}").unwrap();
    None
}

/// Whether two numbers are equal up to rounding.
fn is(one: f64, other: f64) -> bool {
    (one - other).abs() < 1e-9
}

/// A Prometheus that scrapes one app four times a second. It ends when it is dropped.
struct Prometheus {
    base: String,
    client: reqwest::Client,
    _child: Child,
    _folder: tempfile::TempDir,
}

impl Prometheus {
    /// Starts with the example's configuration. Only the target and the intervals differ.
    async fn start(program: &str, app: &App) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut config = read("prometheus.yml");
        for (theirs, ours) in [
            ("127.0.0.1:3000", app.url("").strip_prefix("http://").unwrap()),
            ("scrape_interval: 15s", "scrape_interval: 250ms"),
            ("evaluation_interval: 15s", "evaluation_interval: 250ms"),
        ] {
            assert_eq!(config.matches(theirs).count(), 1, "{theirs} in {config}");
            config = config.replace(theirs, ours);
        }
        std::fs::write(folder.path().join("prometheus.yml"), config).unwrap();
        std::fs::copy(in_example("rules.yml"), folder.path().join("rules.yml")).unwrap();
        let mut child = Command::new(program)
            .args(["--config.file=prometheus.yml", "--storage.tsdb.path=data"])
            .arg("--web.listen-address=127.0.0.1:0")
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut said = String::new();
        let listens = async {
            while let Some(line) = log.next_line().await.unwrap() {
                let address =
                    line.split_once("address=").filter(|_| line.contains("\"Listening on\""));
                if let Some((_, address)) = address {
                    return address.split(' ').next().unwrap().to_owned();
                }
                said.push_str(&line);
                said.push('\n');
            }
            panic!("Prometheus ended at once: {said}");
        };
        let address = tokio::time::timeout(PATIENCE, listens).await.expect("it listens");
        // Reads the rest of the log, so that Prometheus never blocks on it.
        tokio::spawn(async move { while let Ok(Some(_)) = log.next_line().await {} });
        let client = reqwest::Client::builder().timeout(PATIENCE).build().unwrap();
        let base = format!("http://{address}");
        let started = Self { base, client, _child: child, _folder: folder };
        let ready = async || {
            let asked = started.client.get(format!("{}/-/ready", started.base)).send().await;
            asked.is_ok_and(|answer| answer.status().is_success())
        };
        eventually("Prometheus is ready", ready).await;
        started
    }

    async fn ask(&self, path: &str, parameters: &[(&str, &str)]) -> Value {
        let asked = self.client.get(format!("{}/api/v1/{path}", self.base)).query(parameters);
        let answer = asked.send().await.unwrap().text().await.unwrap();
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(answer["status"], "success", "{parameters:?}: {answer}");
        answer["data"].clone()
    }

    async fn query(&self, expression: &str) -> Vec<f64> {
        let data = self.ask("query", &[("query", expression)]).await;
        let samples = data["result"].as_array().unwrap().iter();
        samples.map(|sample| sample["value"][1].as_str().unwrap().parse().unwrap()).collect()
    }

    /// The one value of an expression, if there is one yet.
    async fn value(&self, expression: &str) -> Option<f64> {
        let values = self.query(expression).await;
        assert!(values.len() <= 1, "{expression} has {values:?}");
        values.first().copied()
    }

    async fn every_rule_is_well_and_no_alert_fires(&self) {
        let all_ran = async || {
            let ran = self.rules().await;
            ran.iter().all(|rule| rule["health"] != "unknown")
        };
        eventually("every rule was evaluated", all_ran).await;
        let rules = self.rules().await;
        assert!(rules.len() > 15);
        for rule in rules {
            assert_eq!(rule["health"], "ok", "{rule}");
            assert_ne!(rule["state"], "firing", "{rule}");
        }
    }

    async fn rules(&self) -> Vec<Value> {
        let data = self.ask("rules", &[]).await;
        let groups = data["groups"].as_array().unwrap().iter();
        groups.flat_map(|group| group["rules"].as_array().unwrap().clone()).collect()
    }
}
