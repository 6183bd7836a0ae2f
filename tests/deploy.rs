//! The deployment files fit the program, and each other: variables, pages, ports, users, metrics, headings.

#[allow(dead_code, reason = "each test file uses some of it")]
#[path = "common/sources.rs"]
mod sources;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use relayer::config::{Config, Effective, SinkKind, Sources};
use relayer::telemetry::metrics::{self, Kind};
use serde_json::Value;

const MANIFESTS: [&str; 2] = ["deploy/cloudrun.yaml", "deploy/workerpool.yaml"];
/// Where the collector beside the relayer looks as long as it is not told otherwise.
const COLLECTED: (u64, &str) = (8080, "/metrics");

fn yaml(name: &str) -> Value {
    serde_saphyr::from_str(&sources::text(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn json(name: &str) -> Value {
    serde_json::from_str(&sources::text(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn items<'a>(of: &'a Value, what: &str) -> &'a [Value] {
    of[what].as_array().unwrap_or_else(|| panic!("{what} is no list in {of}"))
}

fn named<'a>(all: &'a [Value], name: &str) -> &'a Value {
    all.iter().find(|it| it["name"] == name).unwrap_or_else(|| panic!("there is no {name}"))
}

fn word<'a>(of: &'a Value, what: &str) -> &'a str {
    of[what].as_str().unwrap_or_else(|| panic!("{what} is no text in {of}"))
}

/// What runs in an instance.
fn instance(manifest: &Value) -> &Value {
    &manifest["spec"]["template"]["spec"]
}

fn relayer(manifest: &Value) -> &Value {
    named(items(instance(manifest), "containers"), "relayer")
}

/// The value of a line of the Dockerfile.
fn of_image<'a>(dockerfile: &'a str, instruction: &str) -> &'a str {
    let line = dockerfile.lines().rev().find_map(|line| line.strip_prefix(instruction));
    line.unwrap_or_else(|| panic!("the Dockerfile has no {instruction}")).trim()
}

fn image_port(dockerfile: &str) -> u64 {
    of_image(dockerfile, "ENV PORT=").parse().expect("a port")
}

/// Configured as the container's variables do it, with `port` as Cloud Run or the image sets it.
fn configured(container: &Value, port: u64) -> (Config, Effective) {
    let mut environment: std::collections::BTreeMap<String, String> = items(container, "env")
        .iter()
        .map(|variable| {
            let value = match variable.get("valueFrom") {
                Some(secret) => {
                    assert!(secret["secretKeyRef"]["name"].is_string(), "{variable}");
                    "https://node.example/v2/KEY".to_owned()
                }
                None => word(variable, "value").to_owned(),
            };
            (word(variable, "name").to_owned(), value)
        })
        .collect();
    environment.insert("PORT".to_owned(), port.to_string());
    environment.insert("K_SERVICE".to_owned(), "relayer".to_owned());
    let sources = Sources { environment, directory: sources::path("src"), ..Sources::default() };
    Config::load(&sources).unwrap_or_else(|error| panic!("{error}"))
}

/// The volume a path of the container lies on.
fn volume_at<'a>(manifest: &'a Value, path: &Path) -> &'a Value {
    let mounts = items(relayer(manifest), "volumeMounts");
    let mount = mounts.iter().find(|mount| path.starts_with(word(mount, "mountPath")));
    let mount = mount.unwrap_or_else(|| panic!("nothing is mounted at {}", path.display()));
    named(items(instance(manifest), "volumes"), word(mount, "name"))
}

#[test]
fn every_variable_of_the_manifests_configures_the_relayer() {
    let port = image_port(&sources::text("Dockerfile"));
    for name in MANIFESTS {
        let manifest = yaml(name);
        let container = relayer(&manifest);
        let (config, effective) = configured(container, port);
        let used: BTreeSet<&str> = effective.rows.iter().map(|row| row.source.as_str()).collect();
        for variable in items(container, "env") {
            let variable = word(variable, "name");
            assert!(used.contains(variable), "{name}: nothing comes from {variable}");
        }
        assert!(matches!(config.sink.kind, SinkKind::Pubsub { .. }), "{name}");
        let listen = config.http.listen.expect("pages");
        assert_eq!((listen.ip().is_unspecified(), u64::from(listen.port())), (true, port), "{name}");
    }
}

#[test]
fn the_store_is_on_a_disk_and_only_snapshots_are_in_a_bucket() {
    let dockerfile = sources::text("Dockerfile");
    for name in MANIFESTS {
        let manifest = yaml(name);
        let environment = items(relayer(&manifest), "env");
        let path = |variable| Path::new(word(named(environment, variable), "value")).to_owned();
        let store = path("RELAYER_STORAGE__PATH");
        assert!(store.is_absolute(), "{name}");
        assert_eq!(volume_at(&manifest, &store)["emptyDir"]["medium"], "Disk", "{name}");
        let bucket = &volume_at(&manifest, &path("RELAYER_STORAGE__SNAPSHOT_DIR"))["csi"];
        assert_eq!(bucket["driver"], "gcsfuse.run.googleapis.com", "{name}");
        let options: BTreeSet<&str> = word(&bucket["volumeAttributes"], "mountOptions").split(',').collect();
        let user = of_image(&dockerfile, "USER ");
        for needed in [
            format!("uid={user}"),
            format!("gid={user}"),
            // The lease is looked at every few seconds: what was so a minute ago is no answer.
            "metadata-cache-ttl-secs=0".to_owned(),
        ] {
            assert!(options.contains(needed.as_str()), "{name}: the bucket is mounted without {needed}");
        }
    }
}

#[test]
fn one_instance_runs_at_all_times_with_its_processor() {
    let service = yaml(MANIFESTS[0]);
    let annotations = &service["spec"]["template"]["metadata"]["annotations"];
    for (annotation, value) in [
        ("autoscaling.knative.dev/minScale", "1"),
        ("autoscaling.knative.dev/maxScale", "1"),
        ("run.googleapis.com/cpu-throttling", "false"),
        ("run.googleapis.com/execution-environment", "gen2"),
    ] {
        assert_eq!(annotations[annotation], value, "{annotation}");
    }
    let pool = yaml(MANIFESTS[1]);
    let annotations = &pool["metadata"]["annotations"];
    assert_eq!(annotations["run.googleapis.com/scalingMode"], "manual");
    assert_eq!(annotations["run.googleapis.com/manualInstanceCount"], "1");
}

#[test]
fn probes_and_collector_ask_for_pages_that_are_there_at_the_port_that_is_listened_on() {
    let program = sources::program();
    let port = image_port(&sources::text("Dockerfile"));
    let is_page = |path: &str| program.contains(&format!("\"{path}\""));
    assert_eq!(port, COLLECTED.0);
    assert!(is_page(COLLECTED.1));
    for name in MANIFESTS {
        let manifest = yaml(name);
        let container = relayer(&manifest);
        for probe in ["startupProbe", "livenessProbe"] {
            let get = &container[probe]["httpGet"];
            assert!(is_page(word(get, "path")), "{name}: there is no page {}", get["path"]);
            assert_eq!(get["port"], port, "{name}: {probe}");
        }
        let collector = named(items(instance(&manifest), "containers"), "collector");
        assert!(collector.get("env").is_none(), "{name}: the collector goes by its own configuration");
    }
    assert_eq!(items(relayer(&yaml(MANIFESTS[0])), "ports")[0]["containerPort"], port);
}

#[test]
fn service_and_worker_pool_run_the_same() {
    let [service, pool] = MANIFESTS.map(yaml);
    let mut of_service = relayer(&service).clone();
    of_service.as_object_mut().expect("a container").remove("ports");
    assert_eq!(of_service, *relayer(&pool));
    assert_eq!(items(instance(&service), "volumes"), items(instance(&pool), "volumes"));
    assert_eq!(instance(&service)["serviceAccountName"], instance(&pool)["serviceAccountName"]);
}

#[test]
fn what_the_image_is_built_from_reaches_the_builder_and_nothing_else_does() {
    let dockerfile = sources::text("Dockerfile");
    let copied: BTreeSet<&str> = dockerfile
        .lines()
        .filter_map(|line| line.strip_prefix("COPY ").filter(|rest| !rest.starts_with("--from")))
        .flat_map(|paths| paths.rsplit_once(' ').expect("from and to").0.split(' '))
        .collect();
    for (file, beside) in [(".dockerignore", &[][..]), (".gcloudignore", &["Dockerfile", ".dockerignore"])] {
        let text = sources::text(file);
        let let_through: BTreeSet<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix('!'))
            .map(|path| path.trim_end_matches("/**").trim_end_matches('/'))
            .collect();
        assert!(text.lines().any(|line| line == "*"), "{file} lets everything through");
        let needed: BTreeSet<&str> = copied.iter().chain(beside).copied().collect();
        assert_eq!(let_through, needed, "{file}");
    }
}

#[test]
fn the_image_is_built_by_the_rust_that_cargo_asks_for_and_runs_as_somebody() {
    let dockerfile = sources::text("Dockerfile");
    let manifest = sources::text("Cargo.toml");
    let rust = manifest.lines().find_map(|line| line.strip_prefix("rust-version = ")).expect("a version");
    assert!(dockerfile.contains(&format!("FROM rust:{}-", rust.trim_matches('"'))), "{rust}");
    assert!(of_image(&dockerfile, "USER ").parse::<u32>().is_ok_and(|user| user != 0));
    assert_eq!(of_image(&dockerfile, "ENTRYPOINT "), r#"["relayer"]"#);
    assert_eq!(of_image(&dockerfile, "STOPSIGNAL "), "SIGTERM");
}

#[test]
fn the_unit_starts_the_relayer_and_leaves_it_time_to_stop() {
    let unit = sources::text("deploy/relayer.service");
    let value = |name: &str| {
        let line = unit.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        line.unwrap_or_else(|| panic!("the unit has no {name}"))
    };
    let mut command = value("ExecStart").split(' ');
    assert!(command.next().is_some_and(|program| program.ends_with("/relayer")));
    let arguments = command.chain(["--help"]);
    let tried = Command::new(env!("CARGO_BIN_EXE_relayer")).args(arguments).output().expect("it starts");
    assert!(tried.status.success(), "{}", String::from_utf8_lossy(&tried.stderr));
    assert_eq!(value("RestartPreventExitStatus"), "2");
    assert_eq!(value("Restart"), "on-failure");
    let seconds: u32 = value("TimeoutStopSec").trim_end_matches('s').parse().expect("seconds");
    assert!(seconds >= 10, "it drains for up to 8 s");
}

/// Where each query of dashboard and alerts stands, and the query.
fn queries() -> Vec<(String, String)> {
    fn gather(value: &Value, title: &str, all: &mut Vec<(String, String)>) {
        let title = ["title", "displayName"].iter().find_map(|key| value[*key].as_str()).unwrap_or(title);
        match value {
            Value::Object(fields) => fields.iter().for_each(|(key, field)| match (key.as_str(), field) {
                ("prometheusQuery" | "query", Value::String(query)) => {
                    all.push((title.to_owned(), query.clone()));
                }
                (_, field) => gather(field, title, all),
            }),
            Value::Array(items) => items.iter().for_each(|item| gather(item, title, all)),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }
    let mut all = Vec::new();
    gather(&json("deploy/dashboard.json"), "", &mut all);
    gather(&json("deploy/alerts.json"), "", &mut all);
    assert!(all.len() > 40, "{}", all.len());
    all
}

/// What a scrape has of a metric.
fn series(name: &str, kind: Kind) -> Vec<String> {
    match kind {
        Kind::Counter | Kind::Gauge => vec![name.to_owned()],
        Kind::Histogram => ["bucket", "sum", "count"].map(|end| format!("{name}_{end}")).to_vec(),
    }
}

#[test]
fn every_metric_of_dashboard_and_alerts_is_one_the_relayer_has() {
    let known: BTreeSet<String> =
        metrics::ALL.iter().flat_map(|&(name, kind, _)| series(name, kind)).collect();
    let mut unknown = BTreeSet::new();
    for (title, query) in queries() {
        let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let mut names = words.filter(|word| word.starts_with("relayer_")).peekable();
        assert!(names.peek().is_some(), "{title}: {query}");
        unknown.extend(names.filter(|name| !known.contains(*name)).map(|name| format!("{title}: {name}")));
    }
    let unknown: Vec<_> = unknown.into_iter().collect();
    assert!(unknown.is_empty(), "there are no such metrics:\n{}", unknown.join("\n"));
}

#[test]
fn every_query_is_promql_where_promtool_can_be_asked() {
    let rules: Vec<Value> = queries()
        .iter()
        .enumerate()
        .map(|(number, (_, query))| serde_json::json!({"record": format!("query:{number}"), "expr": query}))
        .collect();
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("rules.yaml");
    let groups = serde_json::json!({"groups": [{"name": "queries", "rules": rules}]});
    std::fs::write(&file, groups.to_string()).expect("the file is written");
    match Command::new("promtool").args(["check", "rules"]).arg(&file).output() {
        Ok(told) => assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr)),
        Err(error) => eprintln!("no promtool, not looked at: {error}"),
    }
}

#[test]
fn every_alert_says_what_to_do_under_a_heading_that_exists() {
    let headings: BTreeSet<String> =
        sources::anchors(&sources::text("docs/troubleshooting.md")).into_iter().collect();
    let alerts = json("deploy/alerts.json");
    let policies = items(&alerts, "alertPolicies");
    assert!(policies.len() > 15, "{}", policies.len());
    let mut names = BTreeSet::new();
    for policy in policies {
        let (name, says) = (word(policy, "displayName"), word(&policy["documentation"], "content"));
        let heading = says.split("docs/troubleshooting.md#").nth(1).and_then(|rest| rest.split('`').next());
        let heading = heading.unwrap_or_else(|| panic!("{name} does not say what to do: {says}"));
        assert!(headings.contains(heading), "{name}: there is no heading {heading}");
        assert!(names.insert(name), "{name} is there twice");
    }
}
