use std::fs;

use super::*;

/// What has no default.
const REQUIRED: [(&str, &str); 3] = [
    ("CHAIN_ID", "11155111"),
    ("CONTRACT_ADDRESS", "0x311e63dfcefe7f2c202715ef0df01cda82f58914"),
    ("RPC_URL", "https://rpc.example/v2/SECRET"),
];

/// A directory of its own with, maybe, a `relayer.toml`; nothing comes from the process.
struct Setup {
    directory: tempfile::TempDir,
    sources: Sources,
}

impl Setup {
    fn empty() -> Setup {
        let directory = tempfile::tempdir().unwrap();
        let sources = Sources { directory: directory.path().to_owned(), ..Sources::default() };
        Setup { directory, sources }
    }

    /// With what is required in the environment.
    fn sufficient() -> Setup {
        Setup::empty().environment(&REQUIRED)
    }

    fn environment(mut self, variables: &[(&str, &str)]) -> Setup {
        let variables = variables.iter().map(|&(name, value)| (name.to_owned(), value.to_owned()));
        self.sources.environment.extend(variables);
        self
    }

    fn file(self, text: &str) -> Setup {
        fs::write(self.directory.path().join("relayer.toml"), text).unwrap();
        self
    }

    fn overriding(mut self, key: &str, value: &str) -> Setup {
        let pair = (key.to_owned(), value.to_owned());
        self.sources.overrides.push(pair);
        self
    }

    fn config(&self) -> Config {
        match Config::load(&self.sources) {
            Ok((config, _)) => config,
            Err(error) => panic!("{error}"),
        }
    }

    fn effective(&self) -> Effective {
        Config::load(&self.sources).unwrap().1
    }

    fn error(&self) -> String {
        match Config::load(&self.sources) {
            Ok(_) => panic!("must be refused"),
            Err(error) => error.to_string(),
        }
    }

    /// The only problem's line.
    fn problem(&self) -> String {
        let error = self.error();
        let lines: Vec<_> = error.lines().collect();
        assert_eq!(lines.len(), 2, "{error}");
        assert_eq!(lines[0], "1 problem in the configuration:");
        lines[1].trim().to_owned()
    }
}

fn row(effective: &Effective, key: &str) -> (Vec<String>, String) {
    let row = effective.rows.iter().find(|row| row.key == key).unwrap();
    (row.value.clone(), row.source.clone())
}

fn toml(text: &str) -> figment::value::Dict {
    layers::toml(text).unwrap()
}

#[test]
fn without_a_file_the_plans_variables_suffice() {
    let config = Setup::sufficient().config();
    assert_eq!(
        config.chain,
        Chain {
            id: 11_155_111,
            start_block: None,
            horizon: Horizon::Latest,
            confirmations: 2,
            finality_depth: 64,
            max_retractions_per_minute: 5000,
            reading: Reading::Linked,
            poll_interval: Duration::from_secs(4),
        }
    );
    assert_eq!(config.factory.child, "escrow");
    assert_eq!(config.factory.events.len(), 2);
    assert_eq!(config.escrow.events.len(), 7);
    assert_eq!(config.escrow.terminal, ["EscrowReleased", "EscrowRefunded"]);
    assert_eq!(config.rpc.urls.len(), 1);
    assert_eq!(config.rpc.requests_per_second.get(), 25);
    assert_eq!(config.rpc.burst.get(), 25);
    assert_eq!(config.rpc.max_concurrent.get(), 10);
    assert_eq!(config.rpc.max_range.get(), 2000);
    assert_eq!(config.rpc.max_addresses.get(), 1000);
    assert_eq!(config.rpc.max_batch.get(), 100);
    assert_eq!(config.rpc.timeout, Duration::from_secs(20));
    assert_eq!(config.storage.path, PathBuf::from("relayer.redb"));
    assert_eq!(config.sink.kind, SinkKind::Stdout);
    assert_eq!(config.sink.ordering, Ordering::Escrow);
    assert_eq!(config.sink.timeout, Duration::from_secs(15));
    assert_eq!(config.sink.max_outstanding.get(), 1000);
    assert_eq!(config.http.listen, "127.0.0.1:8080".parse().ok());
    assert_eq!(config.log.format, LogFormat::Auto);
}

#[test]
fn all_of_the_plans_variables_are_read() {
    let config = Setup::sufficient()
        .environment(&[
            ("START_BLOCK", "9508300"),
            ("POLL_INTERVAL_SECONDS", "1.5"),
            ("RPC_URL", "https://a.example/KEY, wss://b.example"),
            ("MAX_CONCURRENT_QUERIES", "3"),
            ("BATCH_SIZE", "500"),
            ("PUBSUB_PROJECT_ID", "12345"),
            ("PUBSUB_TOPIC_ID", "events"),
            ("PUBSUB_EMULATOR_HOST", "localhost:8085"),
            ("PORT", "9000"),
        ])
        .config();
    assert_eq!(config.chain.start_block, Some(9_508_300));
    assert_eq!(config.chain.poll_interval, Duration::from_millis(1500));
    let urls: Vec<_> = config.rpc.urls.iter().map(|u| u.expose().as_str()).collect();
    assert_eq!(urls, ["https://a.example/KEY", "wss://b.example/"]);
    assert_eq!(config.rpc.max_concurrent.get(), 3);
    assert_eq!(config.rpc.max_range.get(), 500);
    assert_eq!(
        config.sink.kind,
        SinkKind::Pubsub {
            project: "12345".to_owned(),
            topic: "events".to_owned(),
            endpoint: Some("http://localhost:8085".to_owned()),
            emulator: true,
        }
    );
    assert_eq!(config.http.listen, "0.0.0.0:9000".parse().ok());
}

#[test]
fn later_layers_win_and_each_value_knows_its_source() {
    let mut setup = Setup::sufficient();
    let source = |setup: &Setup| row(&setup.effective(), "rpc.max_range");
    let told = |value: &str, source: &str| (vec![value.to_owned()], source.to_owned());

    assert_eq!(source(&setup), told("2000", "default"));
    setup = setup.file("[rpc]\nmax_range = 1\n");
    assert_eq!(source(&setup), told("1", "relayer.toml"));
    setup = setup.environment(&[("BATCH_SIZE", "2")]);
    assert_eq!(source(&setup), told("2", "BATCH_SIZE"));
    setup = setup.environment(&[("RELAYER_RPC__MAX_RANGE", "3")]);
    assert_eq!(source(&setup), told("3", "RELAYER_RPC__MAX_RANGE"));
    setup = setup.overriding("rpc.max_range", "4");
    assert_eq!(source(&setup), told("4", "command line"));
    assert_eq!(setup.config().rpc.max_range.get(), 4);
}

#[test]
fn every_key_can_be_set_by_its_variable() {
    let mut setup = Setup::empty();
    for (path, value) in [
        ("chain.id", "1"),
        ("chain.start_block", "7"),
        ("chain.horizon", "safe"),
        ("chain.confirmations", "0"),
        ("chain.finality_depth", "1"),
        ("chain.max_retractions_per_minute", "2"),
        ("chain.reading", "ranged"),
        ("chain.poll_interval", "200ms"),
        ("factory.address", "0x311e63dfcefe7f2c202715ef0df01cda82f58914"),
        ("factory.events", "Made(address indexed it, uint8 x), Made(address it)"),
        ("factory.child", "it"),
        ("factory.count_call", "count()"),
        ("escrow.events", r#"["Done(uint8 x, uint8 y)", "Begun()"]"#),
        ("escrow.terminal", "Done"),
        ("escrow.archive_after", "1"),
        ("escrow.count_calls", "Done = done(), Begun=begun() returns (bool)"),
        ("rpc.urls", r#"["http://a/KEY", "ws://b"]"#),
        ("rpc.requests_per_second", "1"),
        ("rpc.burst", "2"),
        ("rpc.max_concurrent", "3"),
        ("rpc.max_range", "4"),
        ("rpc.max_addresses", "5"),
        ("rpc.filter", "topics"),
        ("rpc.max_batch", "6"),
        ("rpc.timeout", "7s"),
        ("rpc.refusals", "wait = Slow  down, cap = at most # blocks please"),
        ("storage.path", "/data/store.redb"),
        ("storage.snapshot_dir", "/snapshots"),
        ("storage.snapshot_interval", "90s"),
        ("storage.snapshot_keep", "9"),
        ("ledger.max_waiting", "11"),
        ("ledger.retention", "forever"),
        ("audit.sample_interval", "off"),
        ("audit.calls_per_hour", "0"),
        ("audit.count_interval", "1m"),
        ("audit.ignored_events", "Paused(address by)"),
        ("sink.kind", "file"),
        ("sink.path", "events.jsonl"),
        ("sink.project", "p"),
        ("sink.topic", "t"),
        ("sink.endpoint", "https://europe-west1-pubsub.googleapis.com"),
        ("sink.timeout", "8s"),
        ("sink.ordering", "bucket:9"),
        ("sink.max_outstanding", "10"),
        ("http.listen", "off"),
        ("http.ready_lag_blocks", "12"),
        ("http.ready_age", "13s"),
        ("log.format", "json"),
    ] {
        let key = KEYS.iter().find(|key| key.path == path).unwrap();
        setup = setup.environment(&[(&key.variable(), value)]);
    }
    assert_eq!(setup.sources.environment.len(), KEYS.len());
    for row in &setup.effective().rows {
        assert!(row.source.starts_with("RELAYER_"), "{row:?}");
    }
    let config = setup.config();
    assert_eq!(config.factory.events.len(), 2);
    assert_eq!(config.escrow.terminal, ["Done"]);
    assert_eq!(config.rpc.urls.len(), 2);
    let told = |meaning, says: &str| RefusalText { meaning, says: says.into() };
    let refusals = [told(Meaning::Wait, "slow down"), told(Meaning::Cap, "at most # blocks please")];
    assert_eq!(config.rpc.refusals, refusals);
    let counted: Vec<&str> = config.escrow.count_calls.iter().map(|it| it.event.as_str()).collect();
    assert_eq!(counted, ["Done", "Begun"]);
    assert_eq!(config.sink.kind, SinkKind::File { path: PathBuf::from("events.jsonl") });
    let (ready_lag_blocks, ready_age) = (12, Duration::from_secs(13));
    assert_eq!(config.http, Http { listen: None, ready_lag_blocks, ready_age });
    assert_eq!(config.log.format, LogFormat::Json);
}

#[test]
fn empty_plain_variables_and_those_of_kubernetes_are_not_ours() {
    let config = Setup::sufficient()
        .environment(&[
            ("PORT", ""),
            ("START_BLOCK", " "),
            ("PUBSUB_PROJECT_ID", ""),
            ("RELAYER_PORT", "tcp://10.0.0.1:80"),
            ("RELAYER_SERVICE_HOST", "10.0.0.1"),
        ])
        .config();
    assert_eq!(config.http.listen, "127.0.0.1:8080".parse().ok());
    assert_eq!(config.chain.start_block, None);
    assert_eq!(config.sink.kind, SinkKind::Stdout);
}

#[test]
fn all_problems_are_told_at_once_each_with_key_value_source_and_advice() {
    let error = Setup::empty()
        .file(
            r#"
            colour = "red"
            [chain]
            id = "sepolia"
            poll_intervall = 5
            poll_interval = 4
            [rpc]
            urls = ["ftp://rpc.example/SECRET", "https://rpc.example/SECRET"]
            burst = 0
            url = "https://rpc.example/SECRET"
            [factory]
            child = "amount"
            [escrow]
            terminal = ["EscrowRelesed"]
            [sink]
            kind = "kafka"
            "#,
        )
        .environment(&[
            ("PORT", "http"),
            ("RELAYER_RPC__URL", "https://rpc.example/SECRET"),
            ("RELAYER_CHAIN__HORIZON", "yesterday"),
        ])
        .overriding("sink.orderin", "none")
        .overriding("sink.ordering", "bucket:none")
        .error();
    let expected = [
        "17 problems in the configuration:",
        "  chain.poll_intervall = 5 (relayer.toml): unknown key; did you mean chain.poll_interval?",
        "  colour = \"red\" (relayer.toml): unknown key; `relayer config` lists the keys there are",
        "  rpc.url (relayer.toml): unknown key; did you mean rpc.urls?",
        "  rpc.url (RELAYER_RPC__URL): unknown key; did you mean RELAYER_RPC__URLS?",
        "  sink.orderin = \"none\" (command line): unknown key; did you mean sink.ordering?",
        "  chain.id = \"sepolia\" (relayer.toml): must be a whole number, not a string",
        "  chain.horizon = \"yesterday\" (RELAYER_CHAIN__HORIZON): must be one of \"latest\", \"safe\", \"finalized\"",
        "  chain.poll_interval = 4 (relayer.toml): must be a duration with its unit: write it like \"200ms\", \"4s\" or \"5m\"",
        "  factory.address: missing; it has no default: set it in relayer.toml, or set CONTRACT_ADDRESS or \
         RELAYER_FACTORY__ADDRESS: the factory's address, 0x and 40 hex digits",
        "  factory.child = \"amount\" (relayer.toml): must be an address, but is uint256 in \"event EscrowDeployed(",
        "  factory.child = \"amount\" (relayer.toml): must be an address, but is uint256 in \"event EscrowDeployed(",
        "  escrow.terminal item 1 = \"EscrowRelesed\" (relayer.toml): is not in escrow.events, which has Approved, \
         EscrowReleased, EscrowRefunded",
        "  rpc.urls item 1 = \"ftp://rpc.example/…\" (relayer.toml): must be a URL with a host, beginning with \
         http://, https://, ws://, wss://",
        "  rpc.burst = 0 (relayer.toml): must be at least 1",
        "  sink.kind = \"kafka\" (relayer.toml): must be one of \"pubsub\", \"stdout\", \"file\"",
        "  sink.ordering = \"bucket:none\" (command line): must be \"escrow\", \"none\" or \"bucket:N\"",
        "  http.listen = \"http\" (PORT): must be a port number, such as 8080",
    ];
    let lines: Vec<_> = error.lines().collect();
    for (line, expected) in lines.iter().zip(expected) {
        assert!(line.starts_with(expected), "{line}\n{expected}\n\n{error}");
    }
    assert_eq!(lines.len(), expected.len(), "{error}");
    assert!(!error.contains("SECRET"), "{error}");
}

#[test]
fn one_problem_reads_as_it_should() {
    for (file, expected) in [
        ("chain = 5", "chain (relayer.toml): chain is a section, not a key: write [chain]"),
        ("[chian]", "chian (relayer.toml): unknown key"),
        ("[chian]\nid = 1", "chian.id = 1 (relayer.toml): unknown key; did you mean chain.id?"),
        ("[rpc]\ntoken = \"abcdefghijklmnop\"", "rpc.token (relayer.toml): unknown key"),
        ("[chain]\nconfirmations = -1", "chain.confirmations = -1 (relayer.toml): must not be negative"),
        (
            "[chain]\nconfirmations = \"2\"",
            "chain.confirmations = \"2\" (relayer.toml): must be a whole number, not a string",
        ),
        ("[chain.reading]\nx = 1", "chain.reading = {…} (relayer.toml): must be a string, not a table"),
        ("[escrow]\nevents = \"A()\"", "escrow.events = \"A()\" (relayer.toml): must be a list"),
        (
            "[escrow]\nevents = []\nterminal = []",
            "escrow.events = [] (relayer.toml): must name at least one event",
        ),
        (
            "[escrow]\nterminal = [\"EscrowReleased\", \"EscrowReleased\"]",
            "escrow.terminal item 2 = \"EscrowReleased\" (relayer.toml): is the same as item 1: remove one of them",
        ),
        (
            "[factory]\nevents = [\"Made(address escrow)\", \"Approved(address indexed escrow)\"]",
            "escrow.events item 1 = \"Approved(address indexed approver)\" (default): has the same topic0 and the \
             same number of indexed arguments as one in factory.events: remove one of them",
        ),
        (
            "[factory]\nchild = \"child\"\nevents = [\"Made(address escrow)\"]",
            "factory.child = \"child\" (relayer.toml): must be an argument of every factory event, but is none of \
             \"event Made(address escrow)\"",
        ),
        (
            "[sink]\nkind = \"file\"",
            "sink.path: missing; sink.kind is \"file\": set it in relayer.toml, or set RELAYER_SINK__PATH: the file \
             events are appended to",
        ),
        (
            "[sink]\nkind = \"pubsub\"",
            "sink.project: missing; sink.kind is \"pubsub\": set it in relayer.toml, or set PUBSUB_PROJECT_ID or",
        ),
        (
            "[sink]\ntopic = \"projects/p/topics/t\"",
            "sink.topic = \"projects/p/topics/t\" (relayer.toml): must be the bare name",
        ),
        ("[chain]\nid = ", "relayer.toml: not valid TOML at line 2, column 6: "),
    ] {
        let problem = Setup::sufficient().file(file).problem();
        assert!(problem.starts_with(expected), "{problem}\n{expected}");
    }
}

#[test]
fn an_rpc_url_is_shown_nowhere() {
    for url in [
        "https://user:SECRET@rpc.example/v2/SECRET?key=SECRET#SECRET",
        "rpc.example/v2/SECRET",
        "htps://rpc.example/v2/SECRET",
        "SECRET",
        "[\"https://rpc.example/SECRET\"",
        "[https://rpc.example/SECRET]",
    ] {
        for key in ["rpc.urls", "sink.endpoint", "factory.address", "rpc.ulrs"] {
            let setup = Setup::sufficient().overriding(key, url);
            let shown = match Config::load(&setup.sources) {
                Ok((config, effective)) => format!("{effective}{effective:?}{config:?}"),
                Err(error) => format!("{error}{error:?}"),
            };
            // Only where no URL belongs and none is recognisable, the value stands.
            let plain = key == "factory.address" && !url.contains("://");
            let endpoint_for_the_client = key == "sink.endpoint" && url.starts_with("https://user");
            if !plain && !endpoint_for_the_client {
                assert!(!shown.contains("SECRET"), "{key}: {shown}");
            }
        }
    }
}

#[test]
fn a_syntax_error_hides_the_line_and_says_nothing_of_what_is_missing() {
    let setup = Setup::empty().file("[rpc]\nurls = [\"https://rpc.example/SECRET\" 5]\n");
    let problem = setup.problem();
    assert!(problem.starts_with("relayer.toml: not valid TOML at line 2"), "{problem}");
    assert!(!problem.contains("SECRET"), "{problem}");
}

#[test]
fn a_named_file_must_exist_and_is_read_instead() {
    let mut setup = Setup::sufficient().file("[chain]\nconfirmations = 5\n");
    setup.sources.file = Some(PathBuf::from("other.toml"));
    let problem = setup.problem();
    assert!(problem.starts_with("other.toml: the configuration file cannot be read"), "{problem}");

    fs::write(setup.directory.path().join("other.toml"), "[chain]\nid = 5").unwrap();
    assert_eq!(setup.config().chain.confirmations, 2);
}

#[test]
fn numbers_stand_for_strings() {
    let config = Setup::sufficient().file("[sink]\nproject = 12345\ntopic = 7\n").config();
    let SinkKind::Pubsub { project, topic, emulator, .. } = config.sink.kind else {
        panic!("a project makes it pubsub");
    };
    assert_eq!((project.as_str(), topic.as_str(), emulator), ("12345", "7", false));
}

#[test]
fn on_cloud_run_the_sink_must_be_said() {
    for variable in CLOUD_RUN {
        let cloud_run = || Setup::sufficient().environment(&[(variable, "relayer")]);
        let problem = cloud_run().problem();
        assert!(problem.starts_with("sink.kind: missing; on Cloud Run"), "{problem}");
        assert!(problem.contains(variable), "{problem}");

        let said = cloud_run().environment(&[("RELAYER_SINK__KIND", "stdout")]);
        assert_eq!(said.config().sink.kind, SinkKind::Stdout);
        let project = cloud_run().environment(&[("PUBSUB_PROJECT_ID", "p")]);
        assert!(matches!(project.config().sink.kind, SinkKind::Pubsub { .. }));
    }
}

#[test]
fn an_endpoint_of_our_own_is_no_emulator() {
    let config = Setup::sufficient()
        .environment(&[
            ("PUBSUB_PROJECT_ID", "p"),
            ("PUBSUB_EMULATOR_HOST", "localhost:8085"),
            ("RELAYER_SINK__ENDPOINT", "https://europe-west1-pubsub.googleapis.com"),
        ])
        .config();
    let SinkKind::Pubsub { endpoint, emulator, .. } = config.sink.kind else {
        panic!("a project makes it pubsub");
    };
    assert_eq!(endpoint.as_deref(), Some("https://europe-west1-pubsub.googleapis.com"));
    assert!(!emulator);
}

#[test]
fn the_effective_configuration_lists_every_key() {
    let effective =
        Setup::sufficient().environment(&[("PORT", "9000"), ("PUBSUB_PROJECT_ID", "p")]).effective();
    let keys: Vec<_> = effective.rows.iter().map(|row| row.key).collect();
    let expected: Vec<_> = KEYS.iter().map(|key| key.path).collect();
    assert_eq!(keys, expected);
    for (key, value, source) in [
        ("chain.start_block", None, "default"),
        ("rpc.urls", Some("\"https://rpc.example/…\""), "RPC_URL"),
        ("http.listen", Some("\"0.0.0.0:9000\""), "PORT"),
        ("sink.kind", Some("\"pubsub\""), "default"),
    ] {
        let value: Vec<String> = value.into_iter().map(str::to_owned).collect();
        assert_eq!(row(&effective, key), (value, source.to_owned()), "{key}");
    }
    assert_eq!(row(&effective, "escrow.events").0.len(), 7);
}

const SHIPPED: &str = include_str!("../../relayer.toml");

#[test]
fn the_shipped_file_is_for_sepolia_and_prints_to_stdout() {
    let config = Setup::empty().file(SHIPPED).config();
    assert_eq!(config.chain.id, 11_155_111);
    assert_eq!(config.chain.start_block, Some(9_508_300));
    assert_eq!(
        config.factory.address.to_string().to_lowercase(),
        "0x311e63dfcefe7f2c202715ef0df01cda82f58914"
    );
    let urls: Vec<_> = config.rpc.urls.iter().map(|u| u.expose().as_str()).collect();
    assert_eq!(urls, ["https://ethereum-sepolia-rpc.publicnode.com/"]);
    assert_eq!(config.sink.kind, SinkKind::Stdout);

    let published = Setup::empty().file(SHIPPED).environment(&[("PUBSUB_PROJECT_ID", "p")]);
    assert!(matches!(published.config().sink.kind, SinkKind::Pubsub { .. }));
}

/// A value stands behind a bare `#`, prose behind `# `; the items of a commented list are indented.
#[test]
fn the_shipped_file_documents_every_key_with_its_default() {
    let uncommented: Vec<_> = SHIPPED
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(value) if !value.starts_with(' ') || value.starts_with("  ") => value,
            _ => line,
        })
        .collect();
    let uncommented = uncommented.join("\n");
    let documented = toml(&uncommented);
    let active = toml(SHIPPED);
    let find =
        |dict: &figment::value::Dict, key: &Key| figment::value::Value::from(dict.clone()).find(key.path);
    for key in KEYS {
        let value = find(&documented, key);
        assert!(value.is_some(), "{} is not documented", key.path);
        if key.default.is_some() && find(&active, key).is_none() {
            assert_eq!(value, key.default_value(), "{}", key.path);
        }
        if let Some(plain) = &key.plain {
            assert!(SHIPPED.contains(plain.variable), "{} is not named", plain.variable);
        }
    }
    Setup::empty().file(&uncommented).config();
}
